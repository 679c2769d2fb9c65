"""Boxes as PaliGemma writes them, and accuracy at an intersection over union of one half."""

import re
from typing import NamedTuple

from parcelray.data.sample import Sample

_LOCATIONS = re.compile(r"<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>")
_THRESHOLD = 0.5
_LAST_BIN = 1023


class Box(NamedTuple):
    """A box in fractions of the image's sides."""

    top: float
    left: float
    bottom: float
    right: float


def format_locations(box: Box) -> str:
    """Four location tokens (y_min, x_min, y_max, x_max), bin = round(fraction x 1023)."""
    return "".join(f"<loc{round(min(max(value, 0.0), 1.0) * _LAST_BIN):04d}>" for value in box)


def parse_locations(text: str) -> Box | None:
    """The first box in a text; None if there is none."""
    match = _LOCATIONS.search(text)
    return Box(*(int(group) / _LAST_BIN for group in match.groups())) if match else None


def iou(first: Box, second: Box) -> float:
    """Intersection over union; 0 for an empty or inverted box."""
    height = max(0.0, min(first.bottom, second.bottom) - max(first.top, second.top))
    width = max(0.0, min(first.right, second.right) - max(first.left, second.left))
    union = _area(first) + _area(second) - height * width
    return height * width / union if union > 0 else 0.0


def box_accuracy(prediction: str, sample: Sample) -> float:
    """1 if the predicted box overlaps an acceptable one with IoU >= 0.5, else 0; NaN if no answer holds a box."""
    targets = [box for answer in sample.answers if (box := parse_locations(answer)) is not None]
    if not targets:
        return float("nan")
    predicted = parse_locations(prediction)
    return float(predicted is not None and max(iou(predicted, target) for target in targets) >= _THRESHOLD)


def _area(box: Box) -> float:
    return max(0.0, box.bottom - box.top) * max(0.0, box.right - box.left)
