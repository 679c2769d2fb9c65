"""Scores of elastic systems over budgets and training seeds: retention, paired differences, and the targets.

An interval covers scenes and seeds. The draws of the scenes are joint over all models (`evaluation/scoring/estimate`),
so differences are paired. To them is added the error of the mean over seeds: Student's t with the variance of single
runs, pooled over the systems. With one seed per system there is no such part, and intervals are those over scenes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint, estimates, retention_of
from parcelray.evaluation.scoring.estimate import DRAWS, Estimate, difference, mean_of
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.studies.elastic.runs import SYSTEMS, VANILLA

PARCEL, M3, MQT, MQT_LOCAL = "parcel", "m3", "mqt", "mqt_local"
OVERALL = "overall"
"""The unweighted mean over the families."""
_SEED = 16
"""Seed of the draws of the seeds' error."""

PerSeed = list[Estimate]
"""One number of one system, for each training seed."""


class Target(NamedTuple):
    """A target of the study and what was measured."""

    text: str
    met: bool
    numbers: str
    """The numbers that decide, with 95 % intervals."""


@dataclass(frozen=True)
class ElasticResults:
    """Scores of all systems at all budgets."""

    splits: Mapping[str, Sequence[Sequence[SplitScores]]]
    """By system: for each training seed, the scores of its splits. The seeds have the same order for all systems."""
    budgets: tuple[int, ...]
    """Visual tokens per image, ascending."""

    @property
    def systems(self) -> list[str]:
        """Systems other than the uncompressed one."""
        return [name for name in self.splits if name != VANILLA]

    @cached_property
    def families(self) -> list[str]:
        """Names of the families."""
        return list(self._scores[VANILLA][0][self.used(VANILLA, self.budgets[-1])])

    @cached_property
    def _scores(self) -> dict[str, list[dict[int, dict[str, Estimate]]]]:
        """Score of each family by system, seed and budget."""
        return {
            system: [{budget: estimates(splits, budget) for budget in splits[0].scores} for splits in seeds]
            for system, seeds in self.splits.items()
        }

    def used(self, system: str, budget: int) -> int:
        """Returns the largest budget of a system that is at most the given one (the vanilla model has only its own)."""
        known = [each for each in self.splits[system][0][0].scores if each]
        return max([each for each in known if each <= budget], default=min(known))

    def score(self, system: str, budget: int, family: str = OVERALL) -> Estimate:
        """Returns the score in percent, as the mean over seeds."""
        return self._mean(lambda name: self._per_seed(name, budget, family), system)

    def retention(self, system: str, budget: int, family: str = OVERALL) -> Estimate:
        """Returns 100 x score / score of the vanilla model of the same seed; overall, the mean over the families."""
        return self._mean(lambda name: self._kept(name, budget, family), system)

    def advantage(self, first: str, second: str, budget: int, *, second_budget: int | None = None) -> Estimate:
        """Returns the paired difference of the scores of two systems: first minus second, percentage points.

        Args:
            first: the one system.
            second: the other one.
            budget: budget of both, in visual tokens per image.
            second_budget: budget of the second; None: that of the first.
        """
        other = budget if second_budget is None else second_budget
        pairs = zip(self._per_seed(first, budget, OVERALL), self._per_seed(second, other, OVERALL), strict=True)
        runs = [self._per_seed(name, budget, OVERALL) for name in self.systems]
        # The runs of two systems are independent: their variances add up.
        return _with_seed_error([difference(ours, theirs) for ours, theirs in pairs], runs, runs_per_value=2)

    def gain(self, system: str, small: int, large: int) -> Estimate:
        """Returns the score at the larger budget minus that at the smaller one, paired by model and question."""

        def gains(name: str) -> PerSeed:
            pairs = zip(self._per_seed(name, large, OVERALL), self._per_seed(name, small, OVERALL), strict=True)
            return [difference(more, less) for more, less in pairs]

        return self._mean(gains, system)

    def _mean(self, numbers: Callable[[str], PerSeed], system: str) -> Estimate:
        alike = self.systems if system != VANILLA else [VANILLA]
        return _with_seed_error(numbers(system), [numbers(name) for name in alike])

    def _per_seed(self, system: str, budget: int, family: str) -> PerSeed:
        by_family = [seed[self.used(system, budget)] for seed in self._scores[system]]
        return [mean_of(list(each.values())) if family == OVERALL else each[family] for each in by_family]

    def _kept(self, system: str, budget: int, family: str) -> PerSeed:
        names = self.families if family == OVERALL else [family]
        bases = {name: self._per_seed(VANILLA, self.budgets[-1], name) for name in names}
        scores = {name: self._per_seed(system, budget, name) for name in names}
        legal = [name for name in names if all(base.value > 0 for base in bases[name])]
        return [
            mean_of([retention_of(scores[name][seed], bases[name][seed]) for name in legal])
            for seed in range(len(self.splits[system]))
        ]

    def frontier(self, family: str = OVERALL) -> Frontier:
        """Returns the retention of all systems at their own budgets as a frontier, for the figures."""
        points = [
            FrontierPoint(
                method=SYSTEMS[system].label,
                num_visual_tokens=budget,
                overall=self.retention(system, budget, family).interval,
                retention=None,
                families={},
                unscored=0,
            )
            for system in self.systems
            for budget in self.budgets
            if self.used(system, budget) == budget
        ]
        return Frontier(tuple(points), reference=None)


def _with_seed_error(members: PerSeed, alike: Sequence[PerSeed], runs_per_value: int = 1) -> Estimate:
    """Averages a number over seeds, and adds the error of this mean to its draws.

    Args:
        members: the number, for each seed.
        alike: for each system, numbers whose variance over seeds is that of single runs; it is pooled.
        runs_per_value: number of independent runs that the number depends on.
    """
    mean = mean_of(members)
    freedom = sum(len(each) - 1 for each in alike)
    if len(members) < 2 or not freedom:
        return mean
    values = [np.array([number.value for number in each]) for each in alike]
    variance = sum(float(np.square(each - each.mean()).sum()) for each in values) / freedom
    error = np.sqrt(runs_per_value * variance / len(members))
    draws = mean.draws + error * np.random.default_rng(_SEED).standard_t(freedom, DRAWS)
    return Estimate(mean.value, draws, mean.n)


def targets(results: ElasticResults) -> list[Target]:
    """Checks the targets of the study, in the order in which docs/elastic.md states them."""
    budgets = results.budgets
    drops = [
        (small, large, gain)
        for index, small in enumerate(budgets)
        for large in budgets[index + 1 :]
        if (gain := results.gain(PARCEL, small, large).interval).high < 0
    ]
    found = [
        Target(
            "PARCEL: no larger budget scores below a smaller one by more than the paired interval allows",
            not drops,
            "; ".join(f"{small} to {large}: {signed(gain)}" for small, large, gain in drops) or "no such pair",
        )
    ]
    for budget, least in ((64, 85), (256, 95)):
        kept = results.retention(PARCEL, budget).interval
        found.append(Target(f"PARCEL: at least {least} % retention at {budget}", kept.value >= least, shown(kept)))
    found += [
        _above(results, "PARCEL is above MQT as published at every budget", MQT, {each: each for each in budgets}),
        _above(results, "PARCEL is above M3 at 16 and 64", M3, {16: 16, 64: 64}),
        _above(results, "PARCEL at 32 and 48 is above M3 at 16", M3, {32: 16, 48: 16}),
        _above(results, "PARCEL at 96, 128 and 192 is above M3 at 64", M3, {96: 64, 128: 64, 192: 64}),
    ]
    return found


def _above(results: ElasticResults, text: str, other: str, pairs: Mapping[int, int]) -> Target:
    """Checks whether PARCEL is above another system; the pairs are PARCEL's budget and that of the other system."""
    gaps = {
        budget: results.advantage(PARCEL, other, budget, second_budget=theirs).interval
        for budget, theirs in pairs.items()
    }
    numbers = "; ".join(f"{budget}: {signed(gap)}" for budget, gap in gaps.items())
    return Target(f"{text}, with intervals that exclude 0", all(gap.low > 0 for gap in gaps.values()), numbers)


def anchor_answer(results: ElasticResults) -> str:
    """Answers in one sentence whether PARCEL's anchors add anything to the local start of the queries."""
    if MQT_LOCAL not in results.systems:
        return "Not measured: MQT with the local start has not been trained."
    gaps = {each: results.advantage(PARCEL, MQT_LOCAL, each).interval for each in results.budgets}
    more = [str(budget) for budget, gap in gaps.items() if gap.low > 0]
    less = [str(budget) for budget, gap in gaps.items() if gap.high < 0]
    open_ones = [str(budget) for budget, gap in gaps.items() if gap.low <= 0 <= gap.high]
    parts = [
        f"{text} {', '.join(names)}"
        for text, names in (
            ("PARCEL scores more than MQT with the local start at", more),
            ("less at", less),
            ("no difference is shown at", open_ones),
        )
        if names
    ]
    return "; ".join(parts) + "."


def shown(interval: Interval) -> str:
    """Formats a percentage with its interval."""
    return f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def signed(interval: Interval) -> str:
    """Formats a difference with its interval."""
    return f"{interval.value:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
