"""The mini suite: a seeded, procedural vision-language data set that a small model can learn on a CPU."""

from parcelray.benchmarks.mini.baselines import baselines, majority_answers
from parcelray.benchmarks.mini.suite import FAMILIES, TASKS, MiniSuite, family_samples
from parcelray.benchmarks.mini.text import VOCABULARY, corpus

__all__ = ["FAMILIES", "TASKS", "VOCABULARY", "MiniSuite", "baselines", "corpus", "family_samples", "majority_answers"]
