"""Commands whose functions belong to no other room, and what they share."""
