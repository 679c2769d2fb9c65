"""95 % intervals: Wilson for proportions, and the cluster bootstrap for everything else.

Samples of one scene (or one NLVR sentence) are not independent, so the bootstrap draws whole scenes.
"""

import math
from collections.abc import Mapping, Sequence
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


def cluster_draws(
    groups: Mapping[str, tuple[Sequence[float], Sequence[str]]], seed: int, draws: int = DRAWS
) -> dict[str, NDArray[np.float64]]:
    """Mean of each group of samples in each bootstrap draw of clusters.

    The clusters of all groups are drawn together, so groups that share clusters (two kinds of question about one
    sentence) vary together as they must. The same clusters under the same seed are drawn alike, which pairs two lists
    of scores of the same samples.

    Args:
        groups: by name, the values of the samples and the cluster of each.
        seed: of the draws.
        draws: how many.

    Returns:
        By name, [draws]; NaN where a draw holds no sample of the group.
    """
    names = sorted({cluster for _, clusters in groups.values() for cluster in clusters})
    place = {name: index for index, name in enumerate(names)}
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws).astype(np.float64)
    means = {}
    for group, (values, clusters) in groups.items():
        owner = np.array([place[cluster] for cluster in clusters])
        # Sums per cluster first: the draws then need [draws, clusters] numbers, not [draws, samples].
        totals = counts @ np.bincount(owner, minlength=len(names)).astype(np.float64)
        sums = counts @ np.bincount(owner, weights=np.asarray(values, dtype=np.float64), minlength=len(names))
        means[group] = np.divide(sums, totals, out=np.full(draws, np.nan), where=totals > 0)
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
    return percentile_interval(
        float(np.mean(values)), cluster_draws({"": (values, clusters)}, seed, draws)[""], len(values)
    )


def bootstrap_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[str], seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Mean of first - second over the same samples, paired."""
    return bootstrap_mean([a - b for a, b in zip(first, second, strict=True)], clusters, seed, draws)
