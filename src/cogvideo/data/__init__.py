"""Data: clips of a user to shards of codes, and shards to batches."""
