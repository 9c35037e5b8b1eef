"""What a model costs in memory and time, before it runs."""
