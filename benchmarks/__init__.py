"""Benchmarks; each prints a table and writes a dated JSON file to benchmarks/results/."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does
