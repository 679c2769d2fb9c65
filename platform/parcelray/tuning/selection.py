"""Choices among finished trials: by a `--select` expression, per benchmark family, and per budget of a split search.

The last two use the rule of one standard error (Breiman et al., 1984): among all trials whose result is within one
standard error of the best, the cheapest is chosen.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from parcelray.config.connector import RouteConfig
from parcelray.errors import UserError
from parcelray.evaluation.scoring.estimate import Estimate, difference
from parcelray.evaluation.scoring.intervals import Interval

Key = TypeVar("Key", bound=Hashable)

_FORM = "max METRIC subject to METRIC <= NUMBER and METRIC >= NUMBER"
_SELECTION = re.compile(r"(?P<mode>max|min)\s+(?P<metric>\S+)(?:\s+subject\s+to\s+(?P<limits>.+))?")
_LIMIT = re.compile(r"(?P<metric>\S+?)\s*(?P<sign><=|>=)\s*(?P<value>[-+.\deE]+)")


@dataclass(frozen=True)
class Limit:
    """An upper or lower bound on a metric."""

    metric: str
    at_most: bool
    """Whether `value` is an upper bound."""
    value: float

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metrics of a trial satisfy the bound; False if the metric is missing."""
        measured = metrics.get(self.metric, float("nan"))
        return measured <= self.value if self.at_most else measured >= self.value

    def __str__(self) -> str:
        return f"{self.metric} {'<=' if self.at_most else '>='} {self.value:g}"


@dataclass(frozen=True)
class Selection:
    """The best value of one metric under limits on others, such as `max retention subject to tokens <= 64`."""

    metric: str
    largest: bool
    """Whether the metric is maximized."""
    limits: tuple[Limit, ...] = ()

    def choose(self, trials: Sequence[Mapping[str, float]]) -> int:
        """Returns the index of the selected trial; the first one of equal trials.

        Args:
            trials: metrics of each finished trial.

        Raises:
            UserError: no trial measured one of the metrics, or no trial satisfies the limits.
        """
        measured = sorted({name for trial in trials for name in trial})
        for name in (self.metric, *(limit.metric for limit in self.limits)):
            if name not in measured:
                raise UserError(
                    f"--select names the metric {name!r}, which no finished trial measured; name one of:"
                    f" {', '.join(measured) or '(no metric measured yet)'}."
                )
        legal = [
            index
            for index, trial in enumerate(trials)
            if self.metric in trial and all(limit.holds(trial) for limit in self.limits)
        ]
        if not legal:
            ranges = [
                f"{limit.metric} is {_range([trial[limit.metric] for trial in trials if limit.metric in trial])}"
                for limit in self.limits
            ]
            raise UserError(
                f"No finished trial has {' and '.join(map(str, self.limits))}; {', '.join(ranges)}. Loosen the limit,"
                " or run more trials."
            )
        return max(legal, key=lambda index: trials[index][self.metric] * (1 if self.largest else -1))


def parse_selection(text: str) -> Selection:
    """Parses a `--select` expression.

    Raises:
        UserError: the expression does not have the form `max METRIC subject to METRIC <= NUMBER`.
    """
    match = _SELECTION.fullmatch(text.strip())
    limits = []
    for part in re.split(r"\s+and\s+|\s*,\s*", match["limits"].strip()) if match and match["limits"] else ():
        limit = _LIMIT.fullmatch(part)
        try:
            limits.append(Limit(limit["metric"], limit["sign"] == "<=", float(limit["value"])) if limit else None)
        except ValueError:
            limits.append(None)
    if match is None or None in limits:
        raise UserError(f"--select is {text!r}; write {_FORM}, for example: max retention subject to tokens <= 64.")
    return Selection(match["metric"], match["mode"] == "max", tuple(limit for limit in limits if limit is not None))


def _range(values: Sequence[float]) -> str:
    return f"{min(values):g} to {max(values):g} in the finished trials" if values else "unknown"


def nearly_best(estimates: Mapping[Key, Estimate]) -> tuple[Key, Sequence[Key]]:
    """Returns the key of the best estimate, and the keys of all estimates within one standard error of it.

    The difference to the best is paired, so its error is much smaller than that of either estimate.
    """
    best = max(estimates, key=lambda key: estimates[key].value)
    return best, [key for key, each in estimates.items() if key == best or _within_one_error(estimates[best], each)]


def _within_one_error(best: Estimate, other: Estimate) -> bool:
    gap = difference(best, other)
    return gap.value <= gap.std_error


class FamilyChoice(NamedTuple):
    """The chosen trial and the best trial of one benchmark family."""

    family: str
    trial: int
    """Index of the chosen trial."""
    retention: Interval
    """Retention of the chosen trial, percent."""
    best: int
    """Index of the trial with the highest retention.

    The value itself is biased upwards, because it is the maximum of many noisy values.
    """
    best_retention: Interval
    near: int
    """Number of trials within one standard error of the best."""


def choose_families(estimates: Mapping[str, Mapping[int, Estimate]], cost: Callable[[int], Any]) -> list[FamilyChoice]:
    """Chooses the cheapest trial of each family among those within one standard error of the best (see `nearly_best`).

    Args:
        estimates: retention by family and trial index, with joint draws over the same samples.
        cost: cost of the trial at an index; less is better.
    """
    choices = []
    for family, by_trial in sorted(estimates.items()):
        best, near = nearly_best(by_trial)
        chosen = min(near, key=cost)
        choices.append(
            FamilyChoice(family, chosen, by_trial[chosen].interval, best, by_trial[best].interval, len(near))
        )
    return choices


class ChosenSplit(NamedTuple):
    """The division of one budget into anchors and queries that the search chose."""

    num_visual_tokens: int
    anchor_grid: int
    """Side of the chosen anchor grid."""
    best: int
    """Side of the anchor grid with the highest value."""
    rule: int | None
    """Side of the anchor grid of the paper's rule; None where the rule does not cover the budget."""
    against_rule: Interval | None
    """Chosen split minus the paper's split, paired over samples, in points."""


def choose_splits(
    values: Mapping[int, Mapping[int, Estimate]], gflops: Mapping[int, Mapping[int, float]], rule: Mapping[int, int]
) -> list[ChosenSplit]:
    """Chooses the cheapest split of each budget among those within one standard error of the best (see `nearly_best`).

    Args:
        values: score or retention by budget and anchor grid, with joint draws over the same samples.
        gflops: GFLOPs of one prefill by budget and anchor grid.
        rule: anchor grid of the paper's rule by budget.
    """
    chosen = []
    for budget, by_grid in sorted(values.items()):
        best, near = nearly_best(by_grid)
        grid = min(near, key=lambda grid: gflops[budget][grid])
        of_rule = rule.get(budget)
        gap = (
            difference(by_grid[grid], by_grid[of_rule]).interval if of_rule is not None and of_rule in by_grid else None
        )
        chosen.append(ChosenSplit(budget, grid, best, of_rule, gap))
    return chosen


def routing_of(splits: Sequence[ChosenSplit], full: int) -> tuple[RouteConfig, ...]:
    """Returns the routing of the chosen splits, by ascending budget.

    The anchor grid of a budget is valid up to the next searched budget, that of the last one up to `full` tokens.
    """
    routes: list[RouteConfig] = []
    for index, split in enumerate(splits):
        last = splits[index + 1].num_visual_tokens - 1 if index + 1 < len(splits) else full
        if routes and routes[-1].anchor_grid == split.anchor_grid:
            routes[-1] = routes[-1].model_copy(update={"max_budget": last})
        else:
            routes.append(
                RouteConfig(min_budget=split.num_visual_tokens, max_budget=last, anchor_grid=split.anchor_grid)
            )
    return tuple(routes)
