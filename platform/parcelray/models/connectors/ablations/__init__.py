"""The ablations of arXiv 2605.30126: one connector per file."""
