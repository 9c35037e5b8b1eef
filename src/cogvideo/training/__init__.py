"""Training of every component."""
