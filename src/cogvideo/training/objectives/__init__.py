"""Objectives: a batch to losses."""
