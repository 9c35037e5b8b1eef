"""A model as components: in memory, on disk, and converted from released checkpoints."""
