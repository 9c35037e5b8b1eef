"""Networks that metrics are defined by, and where their weights come from."""
