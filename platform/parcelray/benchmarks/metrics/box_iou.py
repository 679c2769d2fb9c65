"""Accuracy and mean IoU of boxes that are written as text.

Variants:
    at_50: share of samples with IoU >= 0.5 (RefCOCO's convention), for boxes as PaliGemma's location tokens.
    mean: mean IoU, for boxes as location tokens.
    lmms_eval: like at_50, for boxes as `[left, top, right, bottom]` in fractions of the image's sides, as LLaVA writes
        them (`refcoco_bbox_rec` of lmms-eval, ACC@0.5). LLaVA-1.5's training data are said to use fractions of the
        image padded to a square (haotian-liu/LLaVA, issue 606); lmms-eval does not convert them either.

Only the first box of a prediction counts. A prediction without a box is wrong and counted as unparsed.

Metadata read: `box` (optional): the true box as [top, left, bottom, right], fractions of the image's sides. Without
it (or null), the boxes in the sample's answers are the true ones.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parcelray.benchmarks.metrics.base import MetricResult, scored_mean, variants, wrong_metadata
from parcelray.datasets.boxes import Box, parse_corners, parse_locations
from parcelray.datasets.sample import Sample

_THRESHOLD = 0.5


def iou(first: Box, second: Box) -> float:
    """Returns the intersection over union; 0 for an empty or inverted box."""
    height = max(0.0, min(first.bottom, second.bottom) - max(first.top, second.top))
    width = max(0.0, min(first.right, second.right) - max(first.left, second.left))
    union = _area(first) + _area(second) - height * width
    return height * width / union if union > 0 else 0.0


def best_iou(predicted: Box | None, targets: Sequence[Box]) -> float:
    """Returns the largest IoU of a predicted box with a true box; 0 without a prediction, NaN without a true box."""
    if not targets:
        return math.nan
    return max(iou(predicted, target) for target in targets) if predicted is not None else 0.0


def given_box(sample: Sample, metric: str) -> Box | None:
    """Returns the true box in the metadata of a sample, in fractions of the image's sides; None if it has none.

    Raises:
        UserError: the metadata are no box.
    """
    box = sample.metadata.get("box")
    if box is None:
        return None
    if (
        not isinstance(box, list | tuple)
        or len(box) != len(Box._fields)
        or not all(isinstance(side, int | float) and abs(side) <= sys.float_info.max for side in box)
    ):
        legal = "four finite numbers [top, left, bottom, right] in fractions of the image's sides, or null"
        raise wrong_metadata(sample, "box", legal, metric)
    return Box(*box)


@dataclass(frozen=True)
class BoxIou:
    """Accuracy at IoU 0.5, or mean IoU.

    Args:
        variant: name of the variant.
        read: parses the first box of a text; None if the text contains no box.
    """

    variant: str
    read: Callable[[str], Box | None] = parse_locations
    name: str = "box_iou"
    additive: bool = True
    paper_scale: float = 100.0

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        boxes = [self.read(prediction) for prediction in predictions]
        ious = [best_iou(box, self._targets(sample)) for box, sample in zip(boxes, samples, strict=True)]
        values = tuple(ious) if self.variant == "mean" else accuracies(ious, _THRESHOLD)
        totals = {
            self.name: scored_mean(values),
            "accuracy_50": scored_mean(accuracies(ious, _THRESHOLD)),
            "mean_iou": scored_mean(ious),
        }
        unparsed = sum(not math.isnan(value) and box is None for value, box in zip(ious, boxes, strict=True))
        return MetricResult(values, totals, unparsed)

    def _targets(self, sample: Sample) -> list[Box]:
        if (given := given_box(sample, self.name)) is not None:
            return [given]
        return [box for answer in sample.answers if (box := self.read(answer)) is not None]


def accuracies(ious: Sequence[float], threshold: float) -> tuple[float, ...]:
    """Returns 1 for each IoU that reaches the threshold, else 0; NaN stays NaN."""
    return tuple(value if math.isnan(value) else float(value >= threshold) for value in ious)


def _area(box: Box) -> float:
    return max(0.0, box.bottom - box.top) * max(0.0, box.right - box.left)


BOX_IOU = variants((BoxIou("at_50"), BoxIou("mean"), BoxIou("lmms_eval", parse_corners)))
