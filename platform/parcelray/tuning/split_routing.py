"""From a search over splits to a routing: for every budget the anchor grid that is best, or nearly best and cheaper."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from parcelray.config.connector import RouteConfig
from parcelray.evaluation.scoring.aggregate import difference
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.split_scores import Estimate
from parcelray.tuning.nearly_best import nearly_best


class ChosenSplit(NamedTuple):
    """The split of one budget."""

    num_visual_tokens: int
    anchor_grid: int
    """Chosen."""
    best: int
    """The anchor grid with the highest value."""
    rule: int | None
    """The paper's anchor grid; None where its rule does not reach."""
    against_rule: Interval | None
    """The chosen one minus the paper's, paired over questions, in points."""


def choose_splits(
    values: Mapping[int, Mapping[int, Estimate]], gflops: Mapping[int, Mapping[int, float]], rule: Mapping[int, int]
) -> list[ChosenSplit]:
    """The split of each budget: of all within one standard error of the best, the cheapest (see `nearly_best`).

    Args:
        values: score or retention by budget and anchor grid, with draws over the same questions.
        gflops: of a prefill, alike.
        rule: the paper's anchor grid by budget.
    """
    chosen = []
    for budget, by_grid in sorted(values.items()):
        best, near = nearly_best(by_grid)
        grid = min(near, key=lambda grid: gflops[budget][grid])
        theirs = rule.get(budget)
        gap = difference(by_grid[grid], by_grid[theirs]).interval if theirs is not None and theirs in by_grid else None
        chosen.append(ChosenSplit(budget, grid, best, theirs, gap))
    return chosen


def routing_of(splits: Sequence[ChosenSplit], full: int) -> tuple[RouteConfig, ...]:
    """The intervals: each budget's grid holds up to the next one that was searched, the last up to all patches."""
    routes: list[RouteConfig] = []
    for place, split in enumerate(splits):
        last = splits[place + 1].num_visual_tokens - 1 if place + 1 < len(splits) else full
        if routes and routes[-1].anchor_grid == split.anchor_grid:
            routes[-1] = routes[-1].model_copy(update={"max_budget": last})
        else:
            routes.append(
                RouteConfig(min_budget=split.num_visual_tokens, max_budget=last, anchor_grid=split.anchor_grid)
            )
    return tuple(routes)
