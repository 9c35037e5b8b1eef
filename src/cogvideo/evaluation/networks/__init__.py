"""Networks that define metrics, and the sources of their weights."""
