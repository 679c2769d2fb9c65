"""Boxes in fractions of the image's sides, and the texts that models write: location tokens or corners."""

import re
from typing import NamedTuple

_LOCATIONS = re.compile(r"<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>")
_LAST_BIN = 1023
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_CORNERS = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


class Box(NamedTuple):
    """A box in fractions of the image's sides."""

    top: float
    left: float
    bottom: float
    right: float


def format_locations(box: Box) -> str:
    """Writes a box as four location tokens (top, left, bottom, right), with bin = round(fraction x 1023)."""
    return "".join(f"<loc{round(min(max(value, 0.0), 1.0) * _LAST_BIN):04d}>" for value in box)


def parse_locations(text: str) -> Box | None:
    """Parses the first box in a text; None if the text contains no box."""
    match = _LOCATIONS.search(text)
    return Box(*(int(group) / _LAST_BIN for group in match.groups())) if match else None


def format_corners(box: Box) -> str:
    """Writes a box as LLaVA does: `[left, top, right, bottom]` in fractions of the image's sides, three decimals."""
    return f"[{box.left:.3f}, {box.top:.3f}, {box.right:.3f}, {box.bottom:.3f}]"


def parse_corners(text: str) -> Box | None:
    """Parses the first `[left, top, right, bottom]` in a text; None if the text contains none.

    The rule of lmms-eval's `refcoco_bbox_rec`: four numbers in square brackets, in fractions of the image's sides.
    """
    match = _CORNERS.search(text)
    if match is None:
        return None
    left, top, right, bottom = map(float, match.groups())
    return Box(top, left, bottom, right)
