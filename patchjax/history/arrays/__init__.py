"""Leaves: how their bits are hashed, encoded, stored, read and verified."""
