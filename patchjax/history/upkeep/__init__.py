"""Upkeep: collecting garbage, checking, repacking."""
