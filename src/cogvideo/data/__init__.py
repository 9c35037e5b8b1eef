"""Data: from the user's clips to shards of codes, and from shards to batches."""
