"""The rule of one standard error (Breiman et al., 1984): of all that are so close to the best, the cheapest."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from parcelray.evaluation.scoring.aggregate import difference
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.split_scores import Estimate

Key = TypeVar("Key", bound=Hashable)


class FamilyChoice(NamedTuple):
    """What a search found for one benchmark family."""

    family: str
    trial: int
    """Place of the chosen trial."""
    retention: Interval
    """Of the chosen one."""
    best: int
    """Place of the trial with the highest retention, which is too high for being the best of many noisy ones."""
    best_retention: Interval
    near: int
    """Trials within one standard error of the best."""


def nearly_best(estimates: Mapping[Key, Estimate]) -> tuple[Key, Sequence[Key]]:
    """The best, and all within one standard error of it.

    The difference is paired, so its error is much smaller than that of either.
    """
    best = max(estimates, key=lambda key: estimates[key].value)
    return best, [key for key, each in estimates.items() if key == best or _within_one_error(estimates[best], each)]


def choose_families(estimates: Mapping[str, Mapping[int, Estimate]], cost: Callable[[int], Any]) -> list[FamilyChoice]:
    """The cheapest trial of each family that is nearly as good as the best.

    Args:
        estimates: retention by family and place of the trial, with draws over the same questions.
        cost: of the trial at a place; less is better.
    """
    found = []
    for family, by_trial in sorted(estimates.items()):
        best, near = nearly_best(by_trial)
        chosen = min(near, key=cost)
        found.append(FamilyChoice(family, chosen, by_trial[chosen].interval, best, by_trial[best].interval, len(near)))
    return found


def _within_one_error(best: Estimate, other: Estimate) -> bool:
    gap = difference(best, other)
    return gap.value <= gap.std_error
