"""Parity with the released system: `python -m tests.parity DIR` for any folder in the format of tests/golden.

Prints a table (case, worst logit error, codes equal) and fails unless all codes are equal and every probed logit agrees.
"""
