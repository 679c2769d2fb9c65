"""Coverage of the 95 % intervals of scores, by simulation: `parcelray bench intervals`.

The samples of a cluster are correct with a probability that is drawn for each cluster from a beta distribution (with
`copies`, some clusters instead repeat one answer). A pair of models gives half of its answers in common; the other half
are independent given the probabilities of the cluster, which each model draws for itself.

Shapes: R replicates, K clusters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np

from parcelray.bench.measure import Measure, Report
from parcelray.errors import UserError
from parcelray.evaluation.scoring.aggregate import retention_of
from parcelray.evaluation.scoring.estimate import Estimate, estimate_sums, mean_of
from parcelray.evaluation.scoring.intervals import Design, Floats, combine, difference_stratum, share_limits

if TYPE_CHECKING:
    from rich.table import Table

Model = Literal["beta", "copies"]
SAMPLES = (100, 300, 1000)
CLUSTER_SIZES = (1.0, 3.5, 10.0)
CORRELATIONS = (0.0, 0.1, 0.5)
PROBABILITIES = (0.02, 0.1, 0.5)
KINDS = ("share", "partial", "consistency", "difference", "null", "retention", "mean")
_GOALS = {"share": ">= 93", "partial": ">= 93", "consistency": ">= 93", "difference": ">= 93", "null": "<= 7"}
_WHAT = {
    "share": "share of correct answers",
    "partial": "mean of values 0, 0.3, 0.6 and 1",
    "consistency": "share of clusters that are all correct",
    "difference": "paired difference",
    "null": "true nulls rejected at 0.05",
    "retention": "retention",
    "mean": "mean over two splits",
}
_PARTIAL = ((0.3, 0.25), (0.6, 0.25), (1.0, 0.5))
"""Values of a correct answer that humans do not all agree with, and their probabilities."""
_COMMON = 0.5
"""Share of the answers that two models have in common."""
_BETTER, _KEPT, _SPLITS = 1.5, 0.8, 2
_DERIVED_REPLICATES, _DRAWS = 300, 500


class Setting(NamedTuple):
    """One simulated data set."""

    samples: int
    cluster_size: float
    correlation: float
    """Intra-cluster correlation."""
    probability: float
    """Probability of a correct answer; for consistency, of a wrong one."""


@dataclass(frozen=True)
class CoverageTable:
    """Coverage, and share of rejected true nulls, by kind and setting, percent."""

    coverage: dict[tuple[str, Setting], float]
    replicates: int
    model: Model

    def to_dict(self) -> dict[str, Any]:
        """Returns the measures as every bench does."""
        measures = [
            Measure(
                f"{_WHAT[kind]}: {each.samples} samples, clusters of {each.cluster_size:g}, correlation"
                f" {each.correlation:g}, probability {each.probability:g}",
                value,
                "%",
                goal=_GOALS.get(kind),
            )
            for (kind, each), value in self.coverage.items()
        ]
        report = Report(tuple(measures))
        report.machine.update(replicates=self.replicates, model=self.model)
        return report.to_dict()

    def to_rich(self) -> "Table":
        """Returns one row per design of the data, with the values at all probabilities in each cell."""
        from rich.table import Table

        probabilities = " / ".join(f"{each:g}" for each in dict.fromkeys(each.probability for _, each in self.coverage))
        table = Table(
            "samples", "cluster size", "correlation", *(_WHAT[kind] for kind in KINDS),
            title=f"Coverage of 95 % intervals at probabilities {probabilities}, percent",
            caption=f"{self.replicates} replicates ({_replicates('mean', self.replicates)} for retention and means)",
        )  # fmt: skip
        for design in dict.fromkeys(each[:3] for _, each in self.coverage):
            cells = [
                " / ".join(
                    f"{value:.1f}" for (own, each), value in self.coverage.items() if own == kind and each[:3] == design
                )
                for kind in KINDS
            ]
            table.add_row(str(design[0]), f"{design[1]:g}", f"{design[2]:g}", *cells)
        return table


def bench_intervals(
    replicates: int = 4000,
    model: Model = "beta",
    samples: tuple[int, ...] = SAMPLES,
    say: Callable[[str], None] = lambda line: None,
) -> CoverageTable:
    """Simulates the coverage of every kind of interval.

    Args:
        replicates: number of simulated data sets per setting; retention and means over splits use at most 300.
        model: distribution of the answers of a cluster, `beta` or `copies`.
        samples: numbers of samples.
        say: prints a progress line.
    """
    coverage: dict[tuple[str, Setting], float] = {}
    for setting in _settings(samples):
        say(f"{setting.samples} samples, clusters of {setting.cluster_size:g}, probability {setting.probability:g}")
        for kind in KINDS:
            # A setting has its own seed, so that its numbers do not depend on the others.
            rng = np.random.default_rng([KINDS.index(kind), *(round(100 * each) for each in setting)])
            simulation = _Simulation(setting, _replicates(kind, replicates), model, rng)
            coverage[kind, setting] = 100 * float(np.mean(getattr(simulation, kind)()))
    return CoverageTable(coverage, replicates, model)


def parse_model(text: str) -> Model:
    """Parses the name of a distribution of the answers of a cluster.

    Raises:
        UserError: there is no such distribution.
    """
    for model in get_args(Model):
        if text == model:
            return cast("Model", model)
    raise UserError(f"--clusters is {text!r}; choose one of {', '.join(get_args(Model))}.")


def _settings(samples: tuple[int, ...]) -> Iterator[Setting]:
    for setting in map(Setting._make, product(samples, CLUSTER_SIZES, CORRELATIONS, PROBABILITIES)):
        # Clusters of one sample have no correlation.
        if setting.cluster_size > 1 or setting.correlation == 0:
            yield setting


def _replicates(kind: str, replicates: int) -> int:
    return min(replicates, _DERIVED_REPLICATES) if kind in ("retention", "mean") else replicates


def cluster_sizes(samples: int, mean: float) -> Floats:
    """Returns the sizes of clusters: 3.5 stands for 1, 2, 3, 4, 5, 6, 1, 2, ...; the last cluster is cut."""
    cycle = np.arange(1, 7) if mean == 3.5 else np.array([int(mean)])
    sizes_K = np.tile(cycle, samples // int(cycle.sum()) + 1)
    ends_K = np.minimum(np.cumsum(sizes_K), samples)
    cut_K = np.diff(ends_K, prepend=0)
    return np.asarray(cut_K[cut_K > 0], dtype=np.float64)


class _Simulation:
    """Replicates of one setting; each method returns which of them the interval covers."""

    def __init__(self, setting: Setting, replicates: int, model: Model, rng: np.random.Generator) -> None:
        self.probability, self.correlation = setting.probability, setting.correlation
        self.replicates, self.model, self.rng = replicates, model, rng
        self.sizes_K = cluster_sizes(setting.samples, setting.cluster_size)
        self.design = Design(self.sizes_K)

    def share(self) -> Floats:
        return self._covers(share_limits(self._correct(self.probability), self.design), self.probability)

    def partial(self) -> Floats:
        values, weights = zip(*_PARTIAL, strict=True)
        kinds_RKV = self.rng.multinomial(self._correct(self.probability).astype(np.int64), weights)
        mean = float(np.dot(values, weights))
        return self._covers(share_limits(kinds_RKV @ np.array(values), self.design), self.probability * mean)

    def consistency(self) -> Floats:
        right = 1 - self.probability
        all_right_RK = (self._correct(right) == self.sizes_K).astype(np.float64)
        truth = np.mean([_all_right(right, self.correlation, int(size), self.model) for size in self.sizes_K])
        return self._covers(share_limits(all_right_RK, Design(np.ones(len(self.sizes_K)))), float(truth))

    def difference(self) -> Floats:
        second = min(_BETTER * self.probability, 1.0)
        low_R, high_R, _ = self._differences(self.probability, second)
        return self._covers((low_R, high_R), (1 - _COMMON) * (self.probability - second))

    def null(self) -> Floats:
        return np.asarray(self._differences(self.probability, self.probability)[2] < 0.05, dtype=np.float64)

    def retention(self) -> Floats:
        common_RK = self.rng.binomial(self._sizes(), _COMMON)
        shared_RK = self._correct(self.probability, common_RK)
        full_RK = shared_RK + self._correct(self.probability, self._sizes() - common_RK)
        reduced = self.probability * (_KEPT - _COMMON) / (1 - _COMMON)
        reduced_RK = shared_RK + self._correct(reduced, self._sizes() - common_RK)
        scores, bases = self._estimates(reduced_RK, seed=0, key=0), self._estimates(full_RK, seed=0, key=1)
        covered = []
        for score, base in zip(scores, bases, strict=True):
            # Where the reference scores 0, there is no retention.
            if base.value > 0:
                interval = retention_of(score, base).interval
                covered.append(interval.low <= 100 * _KEPT <= interval.high)
        return np.array(covered, dtype=np.float64)

    def mean(self) -> Floats:
        splits = [self._estimates(self._correct(self.probability), seed, 0) for seed in range(_SPLITS)]
        intervals = [mean_of(members).interval for members in zip(*splits, strict=True)]
        limits = np.array([each.low for each in intervals]), np.array([each.high for each in intervals])
        return self._covers(limits, self.probability)

    def _estimates(self, sums_RK: Floats, seed: int, key: int) -> list[Estimate]:
        sizes_RK, count = np.broadcast_to(self.sizes_K, sums_RK.shape), len(sums_RK)
        keys = [2 * replicate + key for replicate in range(count)]
        return estimate_sums(sums_RK, sizes_RK, [1.0] * count, [True] * count, keys=keys, seed=seed, draws=_DRAWS)

    def _differences(self, first: float, second: float) -> tuple[Floats, Floats, Floats]:
        own_RK = self._sizes() - self.rng.binomial(self._sizes(), _COMMON)
        first_RK, second_RK = self._correct(first, own_RK), self._correct(second, own_RK)
        # Which of the own samples are correct is independent in the two models, given how many are.
        both_RK = self.rng.hypergeometric(first_RK.astype(int), (own_RK - first_RK).astype(int), second_RK.astype(int))
        sums_RK = first_RK - second_RK
        means_R = sums_RK.sum(axis=1) / self.design.n
        squares_R = (first_RK + second_RK - 2 * both_RK).sum(axis=1) - self.design.n * np.square(means_R)
        stratum = difference_stratum(
            means_R[:, None], sums_RK[:, None], squares_R[:, None], self.sizes_K[None], np.ones(1), np.ones(1)
        )
        return combine([stratum])

    def _correct(self, probability: float, sizes_RK: Any = None) -> Floats:
        """Draws the number of correct answers in each cluster."""
        sizes_RK = self._sizes() if sizes_RK is None else sizes_RK
        rho = self.correlation
        if rho == 0:
            correct_RK = self.rng.binomial(sizes_RK, probability)
        elif self.model == "copies":
            independent_RK = self.rng.binomial(sizes_RK, probability)
            copied_RK = sizes_RK * (self.rng.random(sizes_RK.shape) < probability)
            correct_RK = np.where(self.rng.random(sizes_RK.shape) < rho, copied_RK, independent_RK)
        else:
            both = (1 - rho) / rho
            chances_RK = self.rng.beta(probability * both, (1 - probability) * both, size=sizes_RK.shape)
            correct_RK = self.rng.binomial(sizes_RK, chances_RK)
        return np.asarray(correct_RK, dtype=np.float64)

    def _sizes(self) -> Any:
        return np.tile(self.sizes_K.astype(np.int64), (self.replicates, 1))

    @staticmethod
    def _covers(limits: tuple[Floats, Floats], truth: float) -> Floats:
        low_R, high_R = limits
        return np.asarray((low_R <= truth) & (truth <= high_R), dtype=np.float64)


def _all_right(right: float, correlation: float, size: int, model: Model) -> float:
    """Returns the probability that all answers of a cluster are correct."""
    if correlation == 0:
        return float(right**size)
    if model == "copies":
        return float(correlation * right + (1 - correlation) * right**size)
    both = (1 - correlation) / correlation
    return float(np.prod([(right * both + index) / (both + index) for index in range(size)]))
