"""Merges of models that do not fit in memory: leaf by leaf, from files."""
