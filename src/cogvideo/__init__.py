"""CogVideo: text to video with one autoregressive transformer over VQ codes (arXiv 2205.15868)."""

__version__ = "0.1.0"
