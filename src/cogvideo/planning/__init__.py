"""Memory and time of a model, before it runs."""
