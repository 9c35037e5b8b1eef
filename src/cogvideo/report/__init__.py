"""Pages about data and runs, each one self-contained HTML file."""
