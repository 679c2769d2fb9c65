"""Boxes in fractions of the image's sides, and their PaliGemma location tokens."""

import re
from typing import NamedTuple

_LOCATIONS = re.compile(r"<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>")
_LAST_BIN = 1023


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
