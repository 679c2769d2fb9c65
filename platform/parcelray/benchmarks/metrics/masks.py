"""Binary masks from COCO's annotations: run lengths, compressed run lengths, polygons."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parcelray.errors import UserError

Mask = NDArray[np.bool_]

_SUPERSAMPLING = 5


def decode_mask(annotation: Any, where: str) -> Mask:
    """A mask of shape (height, width).

    Args:
        annotation: {"size": [height, width], "counts": run lengths in column-major order, as a list or as COCO's
            compressed string}, or {"size": [height, width], "polygons": [[x0, y0, x1, y1, ...], ...]} in pixels.
        where: the sample's name, for the error.

    Raises:
        UserError: it is neither of these, or the runs do not fill the size.
    """
    if isinstance(annotation, dict) and "size" in annotation:
        height, width = (int(side) for side in annotation["size"])
        if "polygons" in annotation:
            return _union([polygon_mask(points, height, width) for points in annotation["polygons"]], height, width)
        if "counts" in annotation:
            counts = annotation["counts"]
            runs = _decompressed(counts) if isinstance(counts, str) else [int(run) for run in counts]
            if sum(runs) == height * width and all(run >= 0 for run in runs):
                return _from_runs(runs, height, width)
    raise UserError(
        f"The mask of sample {where!r} is not one of COCO's; give it a `size` [height, width] and either `polygons` or"
        " `counts` that add up to height x width."
    )


def polygon_mask(points: Sequence[float], height: int, width: int) -> Mask:
    """Fills a polygon as COCO's reference code does: its outline on a grid five times as fine, then parity down each column.

    Args:
        points: x0, y0, x1, y1, ... in pixels.
        height: of the mask.
        width: of the mask.
    """
    corners = [
        (int(_SUPERSAMPLING * x + 0.5), int(_SUPERSAMPLING * y + 0.5))
        for x, y in zip(points[::2], points[1::2], strict=True)
    ]
    outline = [
        point for start, end in zip(corners, [*corners[1:], corners[0]], strict=True) for point in _edge(start, end)
    ]
    flips = np.zeros(height * width + 1, dtype=np.int64)
    for (u0, v0), (u1, v1) in itertools.pairwise(outline):
        if u0 == u1:
            continue
        column = ((u1 if u1 < u0 else u1 - 1) + 0.5) / _SUPERSAMPLING - 0.5
        if column.is_integer() and 0 <= column <= width - 1:
            row = min(max((min(v0, v1) + 0.5) / _SUPERSAMPLING - 0.5, 0.0), float(height))
            flips[int(column) * height + int(np.ceil(row))] += 1
    filled: Mask = np.cumsum(flips)[:-1] % 2 == 1
    return filled.reshape((height, width), order="F")


def _edge(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Points of an edge, one per step of its longer side, computed from its lower end so that both directions agree."""
    (xs, ys), (xe, ye) = start, end
    dx, dy = abs(xe - xs), abs(ye - ys)
    flipped = xs > xe if dx >= dy else ys > ye
    if flipped:
        xs, ys, xe, ye = xe, ye, xs, ys
    if dx >= dy:
        slope = (ye - ys) / dx if dx else 0.0
        points = [(xs + step, int(ys + slope * step + 0.5)) for step in range(dx + 1)]
    else:
        slope = (xe - xs) / dy
        points = [(int(xs + slope * step + 0.5), ys + step) for step in range(dy + 1)]
    return points[::-1] if flipped else points


def _union(masks: Sequence[Mask], height: int, width: int) -> Mask:
    union: Mask = np.logical_or.reduce([np.zeros((height, width), dtype=np.bool_), *masks])
    return union


def _from_runs(runs: Sequence[int], height: int, width: int) -> Mask:
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape((height, width), order="F")


def _decompressed(text: str) -> list[int]:
    """COCO's string: groups of five bits, low ones first, offset by 48; from the third run on, differences to the last but one."""
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs
