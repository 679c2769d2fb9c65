"""Bootstrap draws of many rows of values of the same samples: the clusters are drawn once for all rows, so that ten thousand draws stay cheap.

Shapes: R rows, N samples, C clusters, W draws.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_AT_A_TIME = 500
"""Draws whose counts are held at once."""


def shared_draws(
    values_RN: Floats, groups: Sequence[str], clusters: Sequence[str], *, seed: int, draws: int
) -> dict[str, Floats]:
    """Mean of each group of samples in each bootstrap draw of whole clusters, for every row.

    All rows and groups see the same draws, so differences and ratios of what is returned are paired.

    Args:
        values_RN: of every sample; NaN: not scored, in no mean.
        groups: of each sample.
        clusters: of each sample: a scene or a sentence.
        seed: of the draws.
        draws: W.

    Returns:
        By group, [R, W]; NaN where a draw holds no scored sample of the group.
    """
    names = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    owner_N = np.array([names[cluster] for cluster in clusters])
    group_N = np.array(groups)
    scored_RN = ~np.isnan(values_RN)
    sums_CR = {
        name: _per_cluster(np.where(scored_RN, values_RN, 0.0), owner_N, group_N == name, len(names))
        for name in dict.fromkeys(groups)
    }
    counts_CR = {
        name: _per_cluster(scored_RN.astype(np.float64), owner_N, group_N == name, len(names)) for name in sums_CR
    }
    found = {name: np.full((len(values_RN), draws), np.nan) for name in sums_CR}
    rng = np.random.default_rng(seed)
    for start in range(0, draws, _AT_A_TIME):
        size = min(_AT_A_TIME, draws - start)
        drawn = rng.integers(len(names), size=(size, len(names))) + len(names) * np.arange(size)[:, None]
        times_WC = np.bincount(drawn.ravel(), minlength=size * len(names)).reshape(size, len(names)).astype(np.float64)
        for name, each in sums_CR.items():
            totals_WR = times_WC @ counts_CR[name]
            means_WR = np.divide(times_WC @ each, totals_WR, out=np.full_like(totals_WR, np.nan), where=totals_WR > 0)
            found[name][:, start : start + size] = means_WR.T
    return found


def _per_cluster(values_RN: Floats, owner_N: NDArray[np.int64], inside_N: NDArray[np.bool_], count: int) -> Floats:
    """Sums of a group's samples: [C, R]."""
    sums_CR = np.zeros((count, len(values_RN)))
    np.add.at(sums_CR, owner_N[inside_N], values_RN[:, inside_N].T)
    return sums_CR
