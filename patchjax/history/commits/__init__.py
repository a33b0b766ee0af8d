"""Commits: their graph, and the verbs that make and read them."""
