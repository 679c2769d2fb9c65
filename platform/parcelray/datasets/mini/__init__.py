"""The mini suite: a seeded, procedural vision-language data set that a small model can learn on a CPU."""

from parcelray.datasets.mini.suite import FAMILIES, TASKS, MiniSuite, family_samples

__all__ = ["FAMILIES", "TASKS", "MiniSuite", "family_samples"]
