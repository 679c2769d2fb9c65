"""Diagnostics of visual tokens: redundancy, spectra, saliency."""
