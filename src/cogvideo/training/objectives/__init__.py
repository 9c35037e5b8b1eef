"""What each stage learns: a batch to losses."""
