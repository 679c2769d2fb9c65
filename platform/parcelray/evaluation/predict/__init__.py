"""Predicts answers to samples with a model, and defines the model that MLflow loads."""

from pathlib import Path

PYFUNC_FILE = Path(__file__).with_name("pyfunc_model.py")
"""The file that MLflow copies into every registered version."""
