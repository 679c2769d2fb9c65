"""95 % intervals: Wilson for proportions, and the cluster bootstrap for everything else.

Samples of one scene (or one NLVR sentence) are not independent, so the bootstrap draws whole scenes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Z95 = 1.959963984540054
DRAWS = 2000
"""Bootstrap draws; the limits of a 95 % interval then move by about a tenth of their distance between seeds."""


class Interval(NamedTuple):
    """An estimate with its 95 % interval over n samples; all NaN where there is nothing to estimate."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval of a proportion (Wilson, JASA 1927)."""
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    share, z2 = successes / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n)


def cluster_weights(clusters: Sequence[str], seed: int, draws: int = DRAWS) -> NDArray[np.float64]:
    """How often each sample counts in each bootstrap draw: [draws, n]. All samples of a cluster count alike.

    Used with the same seed for two lists of scores over the same samples, it makes their comparison a paired one.
    """
    names, owner = np.unique(np.asarray(clusters), return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    weights: NDArray[np.float64] = counts[:, owner].astype(np.float64)
    return weights


def weighted_means(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the values in each draw: [draws]; NaN where a draw holds no sample."""
    totals = weights.sum(axis=1)
    means: NDArray[np.float64] = np.divide(weights @ values, totals, out=np.full(len(totals), np.nan), where=totals > 0)
    return means


def percentile_interval(value: float, draws: NDArray[np.float64], n: int) -> Interval:
    """The middle 95 % of the draws around an estimate."""
    legal = draws[np.isfinite(draws)]
    if n == 0 or not len(legal):
        return Interval(value, math.nan, math.nan, n)
    low, high = np.percentile(legal, [2.5, 97.5])
    return Interval(value, float(low), float(high), n)


def bootstrap_mean(values: Sequence[float], clusters: Sequence[str], seed: int = 0, draws: int = DRAWS) -> Interval:
    """Mean with its cluster-bootstrap interval."""
    if not values:
        return Interval(math.nan, math.nan, math.nan, 0)
    array = np.asarray(values, dtype=np.float64)
    return percentile_interval(float(array.mean()), weighted_means(array, cluster_weights(clusters, seed, draws)), len(array))


def bootstrap_difference(first: Sequence[float], second: Sequence[float], clusters: Sequence[str], seed: int = 0, draws: int = DRAWS) -> Interval:
    """Mean of first - second over the same samples, paired."""
    return bootstrap_mean([a - b for a, b in zip(first, second, strict=True)], clusters, seed, draws)
