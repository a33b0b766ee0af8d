"""Merges that work on the singular vectors of a leaf's matrices."""
