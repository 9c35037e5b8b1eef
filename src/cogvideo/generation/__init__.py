"""Sampling, decoding and the hierarchy: no parameters, no files."""
