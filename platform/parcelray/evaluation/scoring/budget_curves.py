"""What a budget buys: the budget that a split needs, the oracle that knows it for each sample, and the splits that suffer most."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from parcelray.evaluation.scoring.split_scores import SplitScores


class OraclePoint(NamedTuple):
    """A chooser that knows for each sample the fewest tokens that still answer, up to a cap."""

    cap: int
    """Largest budget that it may choose."""
    score: float
    """Mean over samples of the best value at any budget up to the cap, on the paper's scale."""
    mean_tokens: float
    """Visual tokens per image that it spends."""


def needed_budget(scores: Mapping[int, float], full: int, within: float) -> int | None:
    """The smallest budget whose score is within `within` percent of the full one.

    Args:
        scores: by budget, 0 the blind model.
        full: the budget to compare with.
        within: percent of its score that may be lost.

    Returns:
        None if the full score is 0 or unknown.
    """
    base = scores.get(full, math.nan)
    if math.isnan(base) or base <= 0:
        return None
    return min(budget for budget, score in scores.items() if score >= (1 - within / 100) * base)


def oracle_curve(split: SplitScores) -> list[OraclePoint]:
    """The oracle at every cap, the blind model left out; empty where a score is no mean over samples."""
    budgets = sorted(budget for budget in split.scores if budget)
    if not split.additive or not budgets:
        return []
    values_BN = np.array([split.scores[budget].values for budget in budgets], dtype=np.float64)
    values_BN = values_BN[:, ~np.isnan(values_BN).any(axis=0)]
    if not values_BN.shape[1]:
        return []
    points = []
    for number, cap in enumerate(budgets, 1):
        best_N = values_BN[:number].max(axis=0)
        # argmax is the first, so the smallest budget with the best value; a sample that nothing answers gets the
        # smallest.
        chosen_N = np.array(budgets)[values_BN[:number].argmax(axis=0)]
        points.append(OraclePoint(cap, split.scale * float(best_N.mean()), float(chosen_N.mean())))
    return points


def most_sensitive(retentions: Mapping[str, float], count: int = 3) -> list[str]:
    """The splits that lose most, the worst first: the paper's top-3 at 16 tokens."""
    known = {name: value for name, value in retentions.items() if not math.isnan(value)}
    return sorted(known, key=lambda name: (known[name], name))[:count]
