"""Numbers with joint draws, from which the interval of any derived number (retention, mean over splits) is computed.

The draws of a mean are normal, with one standard normal weight per cluster (multiplier bootstrap: Mammen, Annals of
Statistics 1993), and are then mapped to the quantiles of the mean's own interval: the middle 95 % of the draws are that
interval, up to sampling noise. Means over the same clusters use the same weights, so their draws are correlated as the
means are, and differences, ratios and means of them are paired (the principle of MOVER: Zou and Donner, Statistics in
Medicine 2008).

Shapes: X means, N samples, K clusters, W draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from parcelray.evaluation.scoring.intervals import (
    LEVEL,
    Design,
    Floats,
    Interval,
    effective_share,
    mean_error,
    score_limit,
)

DRAWS = 2000
"""Number of draws; between seeds, the limits of a derived interval then vary by about 2 % of its width."""
_CLUSTERS_PER_BLOCK = 4096
"""Number of clusters whose weights are in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A number with its joint draws."""

    value: float
    draws: NDArray[np.float64] = field(repr=False)
    n: int
    limits: tuple[float, float] | None = None
    """Limits of its own 95 % interval; None for a derived number, whose limits are those of the middle draws."""

    @property
    def interval(self) -> Interval:
        """The number with its 95 % confidence interval."""
        low, high = self.limits if self.limits is not None else self._middle(LEVEL)
        if math.isnan(low) or math.isnan(self.value):
            return Interval(self.value, math.nan, math.nan, self.n)
        # Most draws of a mean of several scores of 0 are above 0.
        return Interval(self.value, min(low, self.value), max(high, self.value), self.n)

    @property
    def std_error(self) -> float:
        """Standard error: half of the middle 68.3 % of the draws, which, unlike their deviation, has no outliers."""
        low, high = self._middle(float(ndtr(1) - ndtr(-1)))
        return math.nan if math.isnan(low) else (high - low) / 2

    def _middle(self, level: float) -> tuple[float, float]:
        legal = self.draws[np.isfinite(self.draws)]
        if not self.n or not len(legal):
            return math.nan, math.nan
        low, high = np.quantile(legal, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


class ClusteredValues(NamedTuple):
    """Values of samples, of which the mean is estimated."""

    values: Sequence[float]
    """Value of each sample; NaN: not scored, and left out of the mean."""
    clusters: Sequence[str]
    """Cluster of each sample: a scene or a sentence."""
    scale: float = 1.0
    """Factor from the mean to the estimate."""
    share: bool = True
    """Whether the values are from 0 to 1, as those of all metrics but CIDEr."""
    key: int = 0
    """Number of the answers that the values belong to; rows of the same answers have the same draws."""


def estimate_means(rows: Sequence[ClusteredValues], seed: int, draws: int = DRAWS) -> list[Estimate]:
    """Estimates the mean of each row, with joint draws.

    Calls with the same names of clusters and the same seed use the same weights, so that estimates of two evaluations
    on the same samples are paired.

    Args:
        rows: values of samples, such as one row per split and budget.
        seed: seed of the draws.
        draws: number of draws, W.
    """
    index_of = {name: index for index, name in enumerate(sorted({name for row in rows for name in row.clusters}))}
    sums_XK, sizes_XK = np.zeros((len(rows), len(index_of))), np.zeros((len(rows), len(index_of)))
    for row, sums_K, sizes_K in zip(rows, sums_XK, sizes_XK, strict=True):
        values_N = np.asarray(row.values, dtype=np.float64)
        owner_N = np.array([index_of[name] for name in row.clusters], dtype=np.int64)
        scored_N = ~np.isnan(values_N)
        sums_K += np.bincount(owner_N[scored_N], weights=values_N[scored_N], minlength=len(index_of))
        sizes_K += np.bincount(owner_N[scored_N], minlength=len(index_of))
    return estimate_sums(
        sums_XK,
        sizes_XK,
        [row.scale for row in rows],
        [row.share for row in rows],
        keys=[row.key for row in rows],
        seed=seed,
        draws=draws,
    )


def estimate_sums(
    sums_XK: Floats,
    sizes_XK: Floats,
    scales: Sequence[float],
    shares: Sequence[bool],
    *,
    keys: Sequence[int],
    seed: int,
    draws: int = DRAWS,
) -> list[Estimate]:
    """Estimates means as `estimate_means` does, from the sums over clusters.

    Args:
        sums_XK: sum of the values of each row over each cluster.
        sizes_XK: number of values.
        scales: see `ClusteredValues`.
        shares: see `ClusteredValues`.
        keys: see `ClusteredValues`.
        seed: seed of the draws.
        draws: number of draws, W.
    """
    designs = [Design(sizes_K[sizes_K > 0]) for sizes_K in sizes_XK]
    n_X = sizes_XK.sum(axis=1, keepdims=True)
    means_X = np.divide(sums_XK.sum(axis=1, keepdims=True), n_X, out=np.zeros_like(n_X), where=n_X > 0)
    own_X = np.array(
        [math.sqrt(design.prior) if share and design.n else 0.0 for design, share in zip(designs, shares, strict=True)]
    )
    normals_XW = joint_normals(sums_XK - means_X * sizes_XK, own_X, seed, keys, draws)
    return [
        _estimate(sums_K[sizes_K > 0], design, scale, share, normals_W)
        for sums_K, sizes_K, design, scale, share, normals_W in zip(
            sums_XK, sizes_XK, designs, scales, shares, normals_XW, strict=True
        )
    ]


def joint_normals(residuals_XK: Floats, own_X: Floats, seed: int, keys: Sequence[int], draws: int = DRAWS) -> Floats:
    """Draws standard normal numbers that are correlated as the rows of residuals are: [X, W].

    Args:
        residuals_XK: contribution of each cluster to the error of each estimate.
        own_X: contribution that a row has for itself, in addition: that of one sample. As with the pairs that are added
            to a paired difference, two models that are right on the same samples are not taken as equal.
        seed: seed of the weights of the clusters.
        keys: seed of the own weights of each row.
        draws: number of draws, W.
    """
    rng = np.random.default_rng(seed)
    normals_XW = np.zeros((len(residuals_XK), draws))
    for start in range(0, residuals_XK.shape[1], _CLUSTERS_PER_BLOCK):
        block_XK = residuals_XK[:, start : start + _CLUSTERS_PER_BLOCK]
        normals_XW += block_XK @ rng.standard_normal((block_XK.shape[1], draws))
    for normals_W, own, key in zip(normals_XW, own_X, keys, strict=True):
        if own:
            # The 1 matters: numpy takes [seed, 0] for the same seed as [seed].
            normals_W += own * np.random.default_rng([seed, 1, key]).standard_normal(draws)
    norms_X1 = np.sqrt(np.square(residuals_XK).sum(axis=1, keepdims=True) + np.square(own_X)[:, None])
    np.divide(normals_XW, norms_X1, out=normals_XW, where=norms_X1 > 0)
    return normals_XW


def share_estimate(
    share: float, effective: float, freedom: float, normals_W: Floats, *, scale: float, n: int
) -> Estimate:
    """Makes the estimate of a share, with Wilson's limits and draws at the quantiles of its confidence distribution.

    Args:
        share: the share, 0 to 1.
        effective: effective number of samples.
        freedom: degrees of freedom of the standard error.
        normals_W: draws of `joint_normals`.
        scale: factor from the share to the estimate.
        n: number of samples.
    """
    t = float(stdtrit(freedom, (1 + LEVEL) / 2))
    t_W = np.concatenate([stdtrit(freedom, ndtr(normals_W)), [-t, t]])
    found_W = scale * score_limit(np.array(share), np.array(effective), t_W)
    return Estimate(scale * share, found_W[:-2], n, (float(found_W[-2]), float(found_W[-1])))


def t_estimate(value: float, error: float, freedom: float, normals_W: Floats, *, n: int) -> Estimate:
    """Makes the estimate of a number that is no share, with the limits of the t interval.

    Args:
        value: the number.
        error: its standard error; NaN: unknown.
        freedom: degrees of freedom of the standard error.
        normals_W: draws of `joint_normals`.
        n: number of samples.
    """
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    draws = value + error * np.asarray(stdtrit(freedom, ndtr(normals_W)), dtype=np.float64)
    return Estimate(value, draws, n, (value - half, value + half))


def mean_of(members: Sequence[Estimate]) -> Estimate:
    """Computes the unweighted mean of estimates with joint draws; that of a single one is the estimate itself.

    The draws of a score near 0 are skewed upwards. The sum of many would drift away from the value, so the draws are
    shifted back to it by their median, within the range that is possible.
    """
    if not members:
        return Estimate(math.nan, np.full(DRAWS, np.nan), 0)
    if len(members) == 1:
        return members[0]
    value, draws_MW = float(np.mean([member.value for member in members])), np.array([each.draws for each in members])
    draws_W = draws_MW.mean(axis=0)
    legal_W = draws_W[np.isfinite(draws_W)]
    if len(legal_W):
        least, most = np.nanmin(draws_MW, axis=1).mean(), np.nanmax(draws_MW, axis=1).mean()
        draws_W = np.clip(draws_W + value - np.median(legal_W), min(least, value), max(most, value))
    return Estimate(value, draws_W, sum(member.n for member in members))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Computes first minus second, paired draw by draw."""
    return Estimate(first.value - second.value, first.draws - second.draws, min(first.n, second.n))


def ratio(first: Estimate, second: Estimate, scale: float = 1.0) -> Estimate:
    """Computes scale x first / second, paired draw by draw; draws in which the second is not above 0 have no ratio."""
    draws = np.divide(first.draws, second.draws, out=np.full(len(first.draws), np.nan), where=second.draws > 0)
    value = first.value / second.value if second.value > 0 else math.nan
    return Estimate(scale * value, scale * draws, first.n)


def weighted_sum(members: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Computes the sum of weight x estimate, paired draw by draw."""
    value = sum(weight * member.value for weight, member in zip(weights, members, strict=True))
    draws_W = np.asarray(weights, dtype=np.float64) @ np.array([member.draws for member in members])
    return Estimate(value, draws_W, min(member.n for member in members))


def _estimate(sums_K: Floats, design: Design, scale: float, is_share: bool, normals_W: Floats) -> Estimate:
    if not len(sums_K):
        return Estimate(math.nan, np.full(len(normals_W), np.nan), 0)
    n = round(design.n)
    if is_share:
        share, effective = effective_share(sums_K, design)
        return share_estimate(float(share), float(effective), design.freedom, normals_W, scale=scale, n=n)
    error = scale * float(mean_error(sums_K, design))
    return t_estimate(scale * float(sums_K.sum()) / n, error, design.freedom, normals_W, n=n)
