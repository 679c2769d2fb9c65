"""95 % confidence intervals of shares, means and paired differences over clusters of dependent samples.

Samples of one scene (or one NLVR sentence) are not independent. Each kind of number has one interval:

- A mean of values from 0 to 1 (a share of correct answers, VQA accuracy, consistency): Wilson's score interval (JASA
  1927) with the effective number of samples n / design effect (Kish, Survey Sampling, 1965; Korn and Graubard, Survey
  Methodology 1998) and a quantile of Student's t distribution.
- A mean of other values (correlations, tokens, FLOPs): the cluster-robust t interval.
- A paired difference: the adjusted t interval of Bonett and Price (Journal of Educational and Behavioral Statistics
  2012), which adds one pair in favor of either side, with the same design effect. Its p-value is that of the same t
  statistic, so it is below 0.05 exactly if the 95 % interval excludes 0.
- Everything derived from several scores (retention, means over splits): the middle 95 % of joint draws, see `estimates`
  in `evaluation/scoring/estimate.py`.

docs/metrics.md has the simulated coverage, made by `parcelray bench intervals`.

Shapes: N samples, K clusters, X any leading axes (rows, replicates of a simulation).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Floats = NDArray[np.float64]
LEVEL = 0.95
_PRIOR_CORRELATION = 0.5
"""Correlation of the samples of a cluster that is assumed where the data cannot show it, for example at 0 of n."""
_FEW = 3.0
"""Effective number of successes up to which Wilson's lower limit is too high."""
_ONE_SIDED = 1.644854 / 1.959964
"""Quantile of the one-sided limit, relative to that of the two-sided one: a limit with few events errs to one side."""
_PSEUDO_PAIRS = 2
"""Number of pairs that are added to a paired difference: one in favor of either side."""


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval over n samples; all NaN without samples."""

    value: float
    low: float
    high: float
    n: int


class Design(NamedTuple):
    """How samples are divided into clusters."""

    sizes_K: Floats
    """Number of scored samples of each cluster; clusters without any are left out."""

    @property
    def n(self) -> float:
        """Number of samples."""
        return float(self.sizes_K.sum())

    @property
    def mean_size(self) -> float:
        """Mean cluster size over samples, sum of squared sizes / n; it is the design effect at full correlation."""
        return float(np.square(self.sizes_K).sum()) / self.n

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the variance: effective number of clusters (Kish) minus 1, at least 1."""
        return max(self.n / self.mean_size - 1, 1.0)

    @property
    def t(self) -> float:
        """The quantile of Student's t distribution for 95 % intervals."""
        return float(student.ppf((1 + LEVEL) / 2, self.freedom))

    def effect(self, residuals_XK: Floats, squares_X: Floats, weight: float) -> Floats:
        """Computes the design effect: the variance of a mean relative to that over independent samples.

        The cluster-robust variance (CR2: Bell and McCaffrey, Survey Methodology 2002) is very uncertain if few samples
        differ from the rest, and unknown if none does. So it is averaged with `prior`: at 0 of n, the result is the
        prior alone.

        Args:
            residuals_XK: sum over each cluster of value minus mean.
            squares_X: sum of squared residuals that independent samples would have.
            weight: weight of the prior, as a sum of squared residuals.
        """
        if len(self.sizes_K) < 2:
            return np.full_like(squares_X, self.prior)
        return self.shrunk_effect(self.robust_squares(residuals_XK), squares_X, weight)

    def robust_squares(self, residuals_XK: Floats) -> Floats:
        """Returns n squared times the cluster-robust variance (CR2) of a mean; there must be at least two clusters."""
        return np.asarray((np.square(residuals_XK) / (1 - self.sizes_K / self.n)).sum(axis=-1), dtype=np.float64)

    def shrunk_effect(self, robust_X: Floats, squares_X: Floats, weight: float) -> Floats:
        """Returns the design effect with the prior, see `effect`, for `robust_X` of `robust_squares`."""
        return np.asarray((robust_X + weight * self.prior) / (squares_X + weight), dtype=np.float64)

    @property
    def prior(self) -> float:
        """The design effect where the data show none."""
        return 1 + (self.mean_size - 1) * _PRIOR_CORRELATION


def share_limits(sums_XK: Floats, design: Design) -> tuple[Floats, Floats]:
    """Computes the limits of means of values from 0 to 1.

    Args:
        sums_XK: sum of the values of each cluster.
        design: the clusters.
    """
    share_X, effective_X = effective_share(sums_XK, design)
    return score_limit(share_X, effective_X, -design.t), score_limit(share_X, effective_X, design.t)


def effective_share(sums_XK: Floats, design: Design) -> tuple[Floats, Floats]:
    """Returns the means of values from 0 to 1, and the effective numbers of samples.

    The prior of the design effect weighs as much as one average cluster. With less, shares of a few percent are covered
    too rarely if whole clusters are right or wrong and none of the right ones was drawn.
    """
    share_X = sums_XK.sum(axis=-1) / design.n
    residuals_XK = sums_XK - share_X[..., None] * design.sizes_K
    return share_X, design.n / design.effect(residuals_XK, design.n * share_X * (1 - share_X), design.mean_size)


def score_limit(share_X: Floats, effective_X: Floats, t_X: Floats | float) -> Floats:
    """Returns Wilson's limit: the share from which the observed one is t standard errors away, lower if t < 0.

    Wilson's lower limit of up to `_FEW` successes is too high, so that of the Poisson distribution is used where it is
    lower, and likewise for failures (the modification of Brown, Cai and DasGupta, Statistical Science 2001, section
    4.1.2, here with the approximation of Wilson and Hilferty, as effective numbers of successes are not whole).
    """
    t_X = np.asarray(t_X, dtype=np.float64)
    t2_X = np.square(t_X)
    centre_X = share_X + t2_X / (2 * effective_X)
    # Rounding must not make the variance of a share of 1 negative.
    spread_X = np.maximum(share_X * (1 - share_X), 0) / effective_X + t2_X / (4 * np.square(effective_X))
    wilson_X = (centre_X + t_X * np.sqrt(spread_X)) / (1 + t2_X / effective_X)
    # The limit moves towards 0 or 1; the events are the successes or failures that keep it away from there.
    events_X = np.where(t_X < 0, share_X, 1 - share_X) * effective_X
    rare_X = np.where(events_X <= _FEW, _poisson_limit(events_X, -_ONE_SIDED * np.abs(t_X)) / effective_X, np.inf)
    limit_X = np.where(t_X < 0, np.minimum(wilson_X, rare_X), np.maximum(wilson_X, 1 - rare_X))
    return np.asarray(np.clip(np.where(t_X == 0, share_X, limit_X), 0, 1), dtype=np.float64)


def _poisson_limit(events_X: Floats, z_X: Floats) -> Floats:
    """Returns the mean of a Poisson distribution that lies z standard errors below a number of events."""
    root_X = np.sqrt(np.maximum(events_X, 1e-12))
    return np.asarray(events_X * np.maximum(1 - 1 / (9 * root_X**2) + z_X / (3 * root_X), 0) ** 3, dtype=np.float64)


def mean_error(sums_XK: Floats, design: Design) -> Floats:
    """Computes the cluster-robust standard error (CR2) of means of any values; NaN for a single cluster."""
    if len(design.sizes_K) < 2:
        return np.full(sums_XK.shape[:-1], np.nan)
    residuals_XK = sums_XK - (sums_XK.sum(axis=-1) / design.n)[..., None] * design.sizes_K
    return np.asarray(np.sqrt(design.robust_squares(residuals_XK)) / design.n, dtype=np.float64)


def share_interval(values: Sequence[float], clusters: Sequence[str]) -> Interval:
    """Computes a mean of values from 0 to 1 with its interval; NaN values are left out."""
    sums_K, design, n = cluster_sums(values, clusters)
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    low, high = share_limits(sums_K, design)
    return Interval(float(sums_K.sum()) / n, float(low), float(high), n)


def all_correct_interval(values: Sequence[float], clusters: Sequence[str]) -> Interval:
    """Computes consistency: the share of clusters whose samples are all correct, with its interval over clusters.

    NaN values are left out; n is the number of clusters.
    """
    correct: dict[str, bool] = {}
    for value, cluster in zip(values, clusters, strict=True):
        if not math.isnan(value):
            correct[cluster] = correct.get(cluster, True) and value >= 1
    return share_interval([float(each) for each in correct.values()], list(correct))


def mean_interval(values: Sequence[float]) -> Interval:
    """Computes the mean of independent values with its t interval; the limits of a single value are unknown (NaN)."""
    if not len(values):
        return Interval(math.nan, math.nan, math.nan, 0)
    value, values_K = float(np.mean(values)), np.asarray(values, dtype=np.float64)
    design = Design(np.ones(len(values)))
    half = design.t * float(mean_error(values_K, design))
    return Interval(value, value - half, value + half, len(values))


def cluster_sums(values: Sequence[float], clusters: Sequence[str]) -> tuple[Floats, Design, int]:
    """Returns the sum of the values of each cluster, the sizes, and the number of values; NaN values are left out."""
    index_of = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    values_N, owner_N = np.asarray(values, dtype=np.float64), np.array([index_of[name] for name in clusters], dtype=int)
    scored_N = ~np.isnan(values_N)
    sizes_K = np.bincount(owner_N[scored_N], minlength=len(index_of)).astype(np.float64)
    sums_K = np.bincount(owner_N[scored_N], weights=values_N[scored_N], minlength=len(index_of)).astype(np.float64)
    return sums_K[sizes_K > 0], Design(sizes_K[sizes_K > 0]), int(scored_N.sum())


class Stratum(NamedTuple):
    """The paired difference of one benchmark as a sum of independent parts: its centre, variance and uncertainty."""

    centre_X: Floats
    variance_X: Floats
    freedom: float
    """Degrees of freedom of the variance."""


def difference_stratum(
    means_XS: Floats, sums_XSK: Floats, squares_XS: Floats, counts_SK: Floats, weights_S: Floats, scales_S: Floats
) -> Stratum:
    """Computes the weighted sum over splits of mean paired differences, where the splits may share clusters.

    S are the splits of one benchmark.

    Args:
        means_XS: mean difference of each split.
        sums_XSK: sum of the differences of each split over each cluster.
        squares_XS: sum over samples of (difference - mean difference) squared.
        counts_SK: number of samples of each split in each cluster.
        weights_S: weight of each split.
        scales_S: difference of a pair of which one answer is right and the other wrong.
    """
    n_S = counts_SK.sum(axis=-1)
    unit_S = weights_S / (n_S + _PSEUDO_PAIRS)
    design = Design(counts_SK.sum(axis=0))
    residuals_XSK = sums_XSK - means_XS[..., None] * counts_SK
    own_X = (squares_XS * np.square(unit_S)).sum(axis=-1)
    event_S = np.square(unit_S * scales_S)
    effect_X = design.effect(
        np.einsum("...sk,s->...k", residuals_XSK, unit_S), own_X, float((event_S * n_S).sum() / n_S.sum())
    )
    return Stratum(
        (means_XS * n_S * unit_S).sum(axis=-1),
        effect_X * (own_X + _PSEUDO_PAIRS * float(event_S.sum())),
        design.freedom,
    )


def combine(strata: Sequence[Stratum]) -> tuple[Floats, Floats, Floats]:
    """Adds independent strata; returns the limits and the two-sided p-value of the sum.

    The degrees of freedom are those of Satterthwaite (Biometrics Bulletin 1946).
    """
    centre_X = np.sum([each.centre_X for each in strata], axis=0)
    variance_X = np.sum([each.variance_X for each in strata], axis=0)
    parts_X = np.sum([np.square(each.variance_X) / each.freedom for each in strata], axis=0)
    freedom_X = np.divide(np.square(variance_X), parts_X, out=np.ones_like(variance_X), where=parts_X > 0)
    error_X = np.sqrt(variance_X)
    half_X = student.ppf((1 + LEVEL) / 2, freedom_X) * error_X
    # A variance of 0 belongs to a corpus metric that is the same on both sides in every part of the data.
    statistic_X = np.divide(np.abs(centre_X), error_X, out=np.zeros_like(variance_X), where=error_X > 0)
    return centre_X - half_X, centre_X + half_X, 2 * student.sf(statistic_X, freedom_X)
