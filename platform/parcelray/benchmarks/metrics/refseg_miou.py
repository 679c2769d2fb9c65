"""Referring-expression segmentation (PaliGemma; RefCOCO/+/g): mean IoU of masks written as tokens.

A prediction is four location tokens (top, left, bottom, right, 0 to 1023) and 16 segmentation tokens; the rest is
ignored. The tokens are decoded to 64 x 64 pixels, resized bilinearly to the box in whole pixels, and thresholded at 0.
The score is the mean over expressions of the IoU with the full-resolution mask (not the ratio of summed areas). A
prediction with fewer tokens, a token out of range, or an empty or inverted box scores 0 and is counted as unparsed.

Sub-scores: `box_accuracy_50` and `box_accuracy_75`, the share of predictions whose box has at least that IoU.

Metadata read: `mask` (required): see `decode_mask`. `box` (optional): the true box as [top, left, bottom, right] in
fractions; without it, the bounding box of the mask.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from parcelray.benchmarks.metrics.base import MetricResult, scored_mean, variants
from parcelray.benchmarks.metrics.box_iou import accuracies, given_box, iou
from parcelray.datasets.boxes import Box, parse_locations
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError

if TYPE_CHECKING:
    from parcelray.benchmarks.metrics.mask_decoder import MaskDecoder

_TOKENS = re.compile(r"\s*((?:<loc\d{4}>\s*){4})((?:<seg\d{3}>\s*){16})")
_CODES = 128
_LAST_BIN = 1023
_BATCH = 64
_SUPERSAMPLING = 5

Mask = NDArray[np.bool_]


class Segmentation(NamedTuple):
    """A box, and the codes of the mask inside it."""

    box: Box
    codes: tuple[int, ...]


@dataclass(frozen=True)
class RefSegMiou:
    """Mean IoU of masks.

    Args:
        mask_decoder: .npz file with the decoder's weights. None: only predictions without a segmentation can be scored.

    Raises:
        UserError: the file is missing, or contains no decoder.
    """

    mask_decoder: Path | None = None
    name: str = "refseg_miou"
    variant: str = "big_vision"
    additive: bool = True
    paper_scale: float = 100.0

    def __post_init__(self) -> None:
        # A wrong file is refused even if no prediction needs it.
        if self.mask_decoder is not None:
            _decoder(self.mask_decoder)

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        read = [read_segmentation(prediction) for prediction in predictions]
        inner = self._masks([each.codes for each in read if each is not None])
        values, boxes, unparsed = [], [], 0
        for segmentation, sample in zip(read, samples, strict=True):
            mask64 = next(inner) if segmentation is not None else None
            if "mask" not in sample.metadata:
                values.append(math.nan)
                boxes.append(math.nan)
                continue
            truth = decode_mask(sample.metadata["mask"], sample.id)
            value = (
                mask_iou(segmentation.box, mask64, truth) if segmentation is not None and mask64 is not None else None
            )
            unparsed += value is None
            values.append(value or 0.0)
            boxes.append(iou(segmentation.box, _true_box(sample, truth)) if segmentation is not None else 0.0)
        totals = {self.name: scored_mean(values)}
        totals |= {
            f"box_accuracy_{round(100 * threshold)}": scored_mean(accuracies(boxes, threshold))
            for threshold in (0.5, 0.75)
        }
        return MetricResult(tuple(values), totals, unparsed)

    def _masks(self, codes: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        if not codes:
            return
        if self.mask_decoder is None:
            raise UserError(
                "refseg_miou needs the decoder of segmentation tokens; download PaliGemma's vae-oid.npz and give its"
                " path with mask_decoder."
            )
        decoder = _decoder(self.mask_decoder)
        for start in range(0, len(codes), _BATCH):
            yield from decoder(np.asarray(codes[start : start + _BATCH], dtype=np.int64))


def _decoder(path: Path) -> "MaskDecoder":
    # Imported here because it is the only metric that needs torch.
    from parcelray.benchmarks.metrics.mask_decoder import load_mask_decoder

    return load_mask_decoder(path)


def read_segmentation(text: str) -> Segmentation | None:
    """Parses the box and codes at the start of a prediction; None if tokens are missing or the box is empty."""
    match = _TOKENS.match(text)
    if match is None:
        return None
    locations, codes = ([int(number) for number in re.findall(r"\d+", group)] for group in match.groups())
    top, left, bottom, right = locations
    if max(locations) > _LAST_BIN or max(codes) >= _CODES or bottom <= top or right <= left:
        return None
    box = parse_locations(match.group(1))
    assert box is not None, "the pattern contains four locations"
    return Segmentation(box, tuple(codes))


def mask_iou(box: Box, mask64: NDArray[np.float32], truth: Mask) -> float | None:
    """Returns the IoU of a decoded mask, placed in its box, with the true mask; None if the box has no whole pixel."""
    height, width = truth.shape
    top, left, bottom, right = (
        int(box.top * height),
        int(box.left * width),
        int(box.bottom * height),
        int(box.right * width),
    )
    if bottom <= top or right <= left:
        return None
    resized = Image.fromarray(mask64).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    predicted = np.asarray(resized) > 0
    shared = int(np.count_nonzero(truth[top:bottom, left:right] & predicted))
    union = int(np.count_nonzero(truth)) + int(np.count_nonzero(predicted)) - shared
    return shared / union if union else 0.0


def _true_box(sample: Sample, truth: Mask) -> Box:
    if (given := given_box(sample, "refseg_miou")) is not None:
        return given
    rows, columns = np.flatnonzero(truth.any(axis=1)), np.flatnonzero(truth.any(axis=0))
    if not len(rows):
        return Box(0.0, 0.0, 0.0, 0.0)
    height, width = truth.shape
    return Box(rows[0] / height, columns[0] / width, (rows[-1] + 1) / height, (columns[-1] + 1) / width)


def decode_mask(annotation: Any, where: str) -> Mask:
    """Decodes a COCO annotation (run lengths, compressed run lengths or polygons) into a mask of shape (height, width).

    Args:
        annotation: {"size": [height, width], "counts": run lengths in column-major order, as a list or as COCO's
            compressed string}, or {"size": [height, width], "polygons": [[x0, y0, x1, y1, ...], ...]} in pixels.
        where: id of the sample, for the error message.

    Raises:
        UserError: the annotation has another form, or the runs do not add up to the size.
    """
    try:
        height, width = (int(side) for side in annotation["size"])
        if "polygons" in annotation:
            return _union([polygon_mask(points, height, width) for points in annotation["polygons"]], height, width)
        counts = annotation["counts"]
        runs = _decompressed(counts) if isinstance(counts, str) else [int(run) for run in counts]
        if sum(runs) != height * width or any(run < 0 for run in runs):
            raise ValueError("the run lengths do not add up to the size")
        return _from_runs(runs, height, width)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise UserError(
            f"The mask of sample {where!r} is not a COCO annotation; give it `size` [height, width] and either"
            " `polygons` or `counts` that add up to height x width."
        ) from error


def polygon_mask(points: Sequence[float], height: int, width: int) -> Mask:
    """Fills a polygon as COCO's reference code does.

    It draws the outline on a grid that is five times finer, then fills by parity down each column.

    Args:
        points: x0, y0, x1, y1, ... in pixels.
        height: height of the mask in pixels.
        width: width of the mask in pixels.
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
    """Returns the points of an edge, one per step of its longer side. Both directions give the same points."""
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
    """Decodes COCO's compressed run lengths.

    Each character holds five bits, low bits first, offset by 48. From the third run on, a value is the difference to
    the run before the last.
    """
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


REFSEG_MIOU = variants((RefSegMiou(),))
