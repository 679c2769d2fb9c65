"""Handwritten digits for the mini suite, disjoint between the splits.

The images are the UCI optical recognition set that is part of scikit-learn (8 x 8 pixels).
"""

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
    """Row of the image in the data set."""
    mask: Mask
    """Coverage, [13, width], 0 to 1."""


@cache
def digit_images(split: str) -> tuple[tuple[DigitImage, ...], ...]:
    """Returns the images of a split for each value 0 to 9.

    The images of each value are split in their stored order (80 % training, 10 % validation, 10 % test). Adjacent
    images, which are often by the same writer, are therefore in the same split.
    """
    from sklearn.datasets import load_digits  # imported here because the import is slow

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
