"""Programs that measure; each prints a table and writes a dated JSON under benchmarks/results/."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does
