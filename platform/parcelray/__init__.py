"""parcelray: one vision-language checkpoint, every visual-token budget, on a Ray cluster."""

__version__ = "0.1.0"
