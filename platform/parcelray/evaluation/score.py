"""From answers to per-sample scores."""

from collections.abc import Sequence
from dataclasses import dataclass

from parcelray.benchmarks.metrics import METRICS
from parcelray.data.sample import Sample


@dataclass(frozen=True, slots=True)
class Score:
    """One sample's answer at one budget, and what it is worth."""

    sample_id: str
    benchmark: str
    family: str
    task: str
    scene: str
    num_visual_tokens: int
    prediction: str
    value: float
    """0 to 1; NaN: cannot be scored (counted apart, never as 0)."""


def score(samples: Sequence[Sample], predictions: Sequence[str], *, num_visual_tokens: int) -> list[Score]:
    """Scores each answer by its sample's metric."""
    return [
        Score(sample.id, sample.benchmark, sample.family, sample.task, sample.scene, num_visual_tokens, prediction, METRICS[sample.metric](prediction, sample))
        for sample, prediction in zip(samples, predictions, strict=True)
    ]
