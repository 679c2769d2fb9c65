"""Diagnostics of visual tokens: redundancy, attention, saliency."""
