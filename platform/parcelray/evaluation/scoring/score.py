"""From answers to per-sample scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.metrics.base import MetricResult
from parcelray.datasets.sample import Sample


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
    """0 to 1 (CIDEr: 0 to 10); NaN: cannot be scored (counted apart, never as 0)."""


def score(
    samples: Sequence[Sample], predictions: Sequence[str], *, num_visual_tokens: int, mask_decoder: Path | None = None
) -> list[Score]:
    """Scores each answer by its sample's metric.

    The values of a corpus metric (CIDEr) hold for these samples together; its score is that of the whole set, not their
    mean over a part.

    Args:
        samples: the questions.
        predictions: one answer per sample, in the same order.
        num_visual_tokens: the budget at which they were given.
        mask_decoder: the .npz file that `refseg_miou` needs.

    Raises:
        UserError: a sample's metric is unknown, or lacks what it needs.
        ValueError: the two sequences differ in length.
    """
    values = [0.0] * len(samples)
    for places, result in by_metric(samples, predictions, mask_decoder).values():
        for place, value in zip(places, result.values, strict=True):
            values[place] = value
    return [
        Score(
            sample.id, sample.benchmark, sample.family, sample.task, sample.scene, num_visual_tokens, prediction, value
        )
        for sample, prediction, value in zip(samples, predictions, values, strict=True)
    ]


def by_metric(
    samples: Sequence[Sample], predictions: Sequence[str], mask_decoder: Path | None
) -> dict[str, tuple[list[int], MetricResult]]:
    """For each metric that the samples name, their places and its result, each metric called once."""
    if len(samples) != len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(samples)} samples: one list is shorter than the other"
        )
    places: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(sample.metric, []).append(place)
    return {
        name: (
            members,
            metric(name, mask_decoder=mask_decoder)(
                [predictions[place] for place in members], [samples[place] for place in members]
            ),
        )
        for name, members in places.items()
    }
