"""Real handwritten digits (UCI optical recognition set, 8 x 8 pixels, as shipped with scikit-learn), disjoint between the splits."""

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from parcelray.datasets.mini.drawing import Mask

_HEIGHT = 13
_MAX_WIDTH = 13
_TRAIN_SHARE, _VALIDATION_SHARE = 0.8, 0.1


class DigitImage(NamedTuple):
    """One handwritten digit, cropped to its ink and scaled."""

    row: int
    """Where the image is in the data set."""
    mask: Mask
    """Coverage, [13, width], 0 to 1."""


@cache
def digit_images(split: str) -> tuple[tuple[DigitImage, ...], ...]:
    """The images of a split for each value 0 to 9.

    Each value's images are cut in their stored order (80 % training, 10 % validation, 10 % test), which keeps
    neighbouring images, often by the same writer, on one side.
    """
    from sklearn.datasets import load_digits  # slow to import, and needed only when drawing

    data = load_digits()
    pools: list[tuple[DigitImage, ...]] = []
    for value in range(10):
        rows = np.flatnonzero(data.target == value)
        first, second = int(len(rows) * _TRAIN_SHARE), int(len(rows) * (_TRAIN_SHARE + _VALIDATION_SHARE))
        chosen = {"train": rows[:first], "validation": rows[first:second], "test": rows[second:]}[split]
        pools.append(tuple(DigitImage(int(row), _scaled(data.images[row])) for row in chosen))
    return tuple(pools)


def _scaled(image: Mask) -> Mask:
    ink = image > 4
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    crop = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32) / 16
    width = min(_MAX_WIDTH, max(3, round(crop.shape[1] * _HEIGHT / crop.shape[0])))
    resized = np.asarray(Image.fromarray(crop).resize((width, _HEIGHT), Image.Resampling.BICUBIC))
    return np.clip(resized * 1.2, 0, 1).astype(np.float32)
