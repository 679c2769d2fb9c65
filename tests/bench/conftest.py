"""Fixtures: the model, processor and samples of the serving tests, for the load generator."""

from tests.serving.conftest import model, processor, samples

__all__ = ["model", "processor", "samples"]
