"""Measurements, each run by `python -m experiments.bench.NAME`."""

import os

# Threads of OpenBLAS wait for each other by spinning, and beside those of XLA
# a decomposition takes many times as long. Read when the library is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
