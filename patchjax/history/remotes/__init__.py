"""Remotes: other repositories, and what is copied from and to them."""
