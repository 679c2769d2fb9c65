"""Answers of a model to samples, and the same model as MLflow loads it."""

from pathlib import Path

PYFUNC_FILE = Path(__file__).with_name("pyfunc_model.py")
"""The file that MLflow copies into every registered version."""
