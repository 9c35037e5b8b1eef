"""Commands that belong to no other package, and what they share."""
