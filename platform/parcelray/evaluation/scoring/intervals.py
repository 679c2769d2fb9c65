"""95 % confidence intervals: Wilson's for proportions, and the cluster bootstrap for everything else.

Samples of one scene (or one NLVR sentence) are not independent, so the bootstrap draws whole scenes.

Shapes: R rows, N samples, C clusters, W draws.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_Z95 = 1.959963984540054
DRAWS = 2000
"""Number of bootstrap draws; between seeds, the limits of a 95 % interval then vary by about 10 % of its width."""
_DRAWS_PER_BLOCK = 500
"""Number of draws whose counts are in memory at once, in `shared_draws`."""


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval over n samples; all NaN without samples."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: int, n: int) -> Interval:
    """Computes Wilson's score interval of a proportion (Wilson, JASA 1927)."""
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    share, z2 = successes / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n)


def cluster_draws(
    groups: Mapping[str, tuple[Sequence[float], Sequence[str]]], seed: int, draws: int = DRAWS
) -> dict[str, NDArray[np.float64]]:
    """Computes the mean of each group of samples in each bootstrap draw of clusters.

    The clusters of all groups are drawn together, so groups that share clusters (two kinds of question about one
    sentence) vary together. The same clusters with the same seed give the same draws, which pairs two lists of scores
    of the same samples.

    Args:
        groups: by name, the values of the samples and the cluster of each.
        seed: seed of the draws.
        draws: number of draws.

    Returns:
        The means by name, [draws]; NaN where a draw holds no sample of the group.
    """
    names = sorted({cluster for _, clusters in groups.values() for cluster in clusters})
    index_of = {name: index for index, name in enumerate(names)}
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws).astype(np.float64)
    means = {}
    for group, (values, clusters) in groups.items():
        owner = np.array([index_of[cluster] for cluster in clusters])
        # Summing per cluster first needs [draws, clusters] numbers instead of [draws, samples].
        totals = counts @ np.bincount(owner, minlength=len(names)).astype(np.float64)
        sums = counts @ np.bincount(owner, weights=np.asarray(values, dtype=np.float64), minlength=len(names))
        means[group] = np.divide(sums, totals, out=np.full(draws, np.nan), where=totals > 0)
    return means


def shared_draws(
    values_RN: Floats, groups: Sequence[str], clusters: Sequence[str], *, seed: int, draws: int
) -> dict[str, Floats]:
    """Computes the mean of each group of samples in each bootstrap draw of whole clusters, for every row.

    The clusters are drawn once for all rows, so that ten thousand draws of many rows stay cheap. All rows and groups
    use the same draws, so differences and ratios of the returned means are paired.

    Args:
        values_RN: value of every sample; NaN: not scored, and left out of the means.
        groups: group of each sample.
        clusters: cluster of each sample: a scene or a sentence.
        seed: seed of the draws.
        draws: number of draws, W.

    Returns:
        The means by group, [R, W]; NaN where a draw holds no scored sample of the group.
    """
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
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
    for start in range(0, draws, _DRAWS_PER_BLOCK):
        size = min(_DRAWS_PER_BLOCK, draws - start)
        drawn = rng.integers(len(names), size=(size, len(names))) + len(names) * np.arange(size)[:, None]
        times_WC = np.bincount(drawn.ravel(), minlength=size * len(names)).reshape(size, len(names)).astype(np.float64)
        for name, each in sums_CR.items():
            totals_WR = times_WC @ counts_CR[name]
            means_WR = np.divide(times_WC @ each, totals_WR, out=np.full_like(totals_WR, np.nan), where=totals_WR > 0)
            found[name][:, start : start + size] = means_WR.T
    return found


def percentile_interval(value: float, draws: NDArray[np.float64], n: int) -> Interval:
    """Returns the middle 95 % of the draws as the interval of an estimate."""
    legal = draws[np.isfinite(draws)]
    if n == 0 or not len(legal):
        return Interval(value, math.nan, math.nan, n)
    low, high = np.percentile(legal, [2.5, 97.5])
    return Interval(value, float(low), float(high), n)


def bootstrap_mean(values: Sequence[float], clusters: Sequence[str], seed: int = 0, draws: int = DRAWS) -> Interval:
    """Computes a mean with its cluster-bootstrap interval."""
    if not values:
        return Interval(math.nan, math.nan, math.nan, 0)
    return percentile_interval(
        float(np.mean(values)), cluster_draws({"": (values, clusters)}, seed, draws)[""], len(values)
    )


def _per_cluster(values_RN: Floats, owner_N: NDArray[np.int64], inside_N: NDArray[np.bool_], count: int) -> Floats:
    """Sums a group's samples per cluster: [C, R]."""
    sums_CR = np.zeros((count, len(values_RN)))
    np.add.at(sums_CR, owner_N[inside_N], values_RN[:, inside_N].T)
    return sums_CR
