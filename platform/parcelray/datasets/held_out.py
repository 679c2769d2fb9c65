"""Held-out splits of rows that have none: whole clusters, chosen by a seed."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from parcelray.config.data import HeldOut

RowSplit = Literal["train", "validation", "test"]
SPLITS: tuple[RowSplit, ...] = ("train", "validation", "test")
_FEWEST_CLUSTERS = 3
"""Number of clusters from which each split with a fraction has at least one."""


def assigned_splits(clusters: Sequence[str], held_out: HeldOut) -> NDArray[np.uint8]:
    """Assigns rows to splits: the index into `SPLITS` of each row.

    The clusters are sorted by a hash of their names and the seed; the first are the test split, the next the validation
    split.

    Args:
        clusters: name of the cluster of each row; rows that share an image have the same.
        held_out: fractions and seed.
    """
    parts_R = np.zeros(len(clusters), dtype=np.uint8)
    if not held_out.any:
        return parts_R
    names = sorted(set(clusters), key=lambda name: hashlib.sha256(f"{held_out.seed}:{name}".encode()).digest())
    part_of: dict[str, int] = {}
    start = 0
    for part, fraction in ((2, held_out.test), (1, held_out.validation)):
        count = max(1, round(fraction * len(names))) if fraction and len(names) >= _FEWEST_CLUSTERS else 0
        part_of |= dict.fromkeys(names[start : start + count], part)
        start += count
    return np.array([part_of.get(name, 0) for name in clusters], dtype=np.uint8)
