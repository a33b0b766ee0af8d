"""Merging eight specialists of a real sentence encoder, by every method.

    python -m experiments.merging --config=configs/merging_minilm.py

trains specialists of MiniLM on eight text tasks (or takes them from the
cache), merges them by each method with settings chosen on validation texts,
tests what came out, and writes a table and a figure.
"""

import os

# Threads of OpenBLAS wait for each other by spinning, and beside those of XLA
# a decomposition takes many times as long. Read when the library is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
