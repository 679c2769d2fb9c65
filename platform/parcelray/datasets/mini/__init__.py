"""The mini suite: a seeded, procedural vision-language data set that a small model can learn on a CPU."""

from parcelray.datasets.mini.suite import FAMILIES, TASKS, MiniSuite, family_samples
from parcelray.datasets.mini.text import VOCABULARY, corpus

__all__ = ["FAMILIES", "TASKS", "VOCABULARY", "MiniSuite", "corpus", "family_samples"]
