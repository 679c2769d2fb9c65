"""Boxes as PaliGemma writes them: accuracy at an intersection over union of one half, and the mean of the latter.

Variants:
    at_50: the share of samples with IoU >= 0.5 (RefCOCO's convention).
    mean: the mean IoU.

The first box of an answer counts, never the best of several. An answer without a box is wrong and counted as unparsed.

Metadata read: `box` (optional): the true box as [top, left, bottom, right] in fractions of the image's sides; without
it, the boxes in the sample's answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from parcelray.benchmarks.metrics.base import MetricResult, scored_mean, variants
from parcelray.datasets.boxes import Box, parse_locations
from parcelray.datasets.sample import Sample

_THRESHOLD = 0.5


def iou(first: Box, second: Box) -> float:
    """Intersection over union; 0 for an empty or inverted box."""
    height = max(0.0, min(first.bottom, second.bottom) - max(first.top, second.top))
    width = max(0.0, min(first.right, second.right) - max(first.left, second.left))
    union = _area(first) + _area(second) - height * width
    return height * width / union if union > 0 else 0.0


def best_iou(prediction: str, sample: Sample) -> float:
    """IoU of the predicted box with the nearest acceptable one; 0 without a predicted box, NaN without a true one."""
    targets = _targets(sample)
    if not targets:
        return math.nan
    predicted = parse_locations(prediction)
    return max(iou(predicted, target) for target in targets) if predicted is not None else 0.0


@dataclass(frozen=True)
class BoxIou:
    """Accuracy at 0.5 or mean IoU."""

    variant: str
    name: str = "box_iou"
    additive: bool = True
    paper_scale: float = 100.0

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        ious = [best_iou(prediction, sample) for prediction, sample in zip(predictions, samples, strict=True)]
        values = tuple(ious) if self.variant == "mean" else accuracies(ious, _THRESHOLD)
        totals = {
            self.name: scored_mean(values),
            "accuracy_50": scored_mean(accuracies(ious, _THRESHOLD)),
            "mean_iou": scored_mean(ious),
        }
        unparsed = sum(
            not math.isnan(value) and parse_locations(text) is None
            for value, text in zip(ious, predictions, strict=True)
        )
        return MetricResult(values, totals, unparsed)


def accuracies(ious: Sequence[float], threshold: float) -> tuple[float, ...]:
    """1 from the threshold on, else 0; NaN stays."""
    return tuple(value if math.isnan(value) else float(value >= threshold) for value in ious)


def _targets(sample: Sample) -> list[Box]:
    if "box" in sample.metadata:
        return [Box(*sample.metadata["box"])]
    return [box for answer in sample.answers if (box := parse_locations(answer)) is not None]


def _area(box: Box) -> float:
    return max(0.0, box.bottom - box.top) * max(0.0, box.right - box.left)


BOX_IOU = variants((BoxIou("at_50"), BoxIou("mean")))
