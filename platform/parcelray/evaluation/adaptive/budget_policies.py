"""Budget policies, replayed on a finished evaluation: the answers that each policy would give, and its cost.

A policy chooses a visual-token budget for each question.

Shapes: N questions, B budgets, W draws.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parcelray.evaluation.adaptive.budget_predictor import BudgetPredictor
from parcelray.evaluation.adaptive.calibration import Calibration
from parcelray.evaluation.scoring.estimate import DRAWS, ClusteredValues, Estimate, estimate_means, mean_of

_CORRECT = 0.5
"""Smallest value of a correct answer; most metrics give only 0 and 1."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BudgetTable:
    """The answer to every question of an evaluation at every budget, with its value and cost."""

    budgets: tuple[int, ...]
    """Visual tokens per image, ascending, without the blind baseline."""
    splits: tuple[str, ...]
    """Split of each question."""
    scenes: tuple[str, ...]
    """Scene of each question; the questions of a scene are dependent, and are in the same fold."""
    values_NB: Floats
    """Value of each answer, on the metric's own scale."""
    scales: Mapping[str, float]
    """Factor of each split from the metric's own scale to the paper's."""
    log_probs_NB: Floats
    """Mean log-probability of each answer."""
    encoding_N: Floats
    """FLOPs of the vision tower, once for all budgets."""
    passes_NB: Floats
    """FLOPs of the rest of a pass: connector, prefill and decoding."""

    @property
    def correct_NB(self) -> NDArray[np.bool_]:
        """Whether each answer is correct, bool [N, B]."""
        return self.values_NB >= _CORRECT

    @property
    def confidence_NB(self) -> Floats:
        """Confidence of each answer: the geometric mean of the probabilities of its tokens."""
        return np.exp(self.log_probs_NB)


class Choices(NamedTuple):
    """The budgets that a policy chose for every question."""

    chosen_N: NDArray[np.int64]
    """Index of the budget whose answer is returned."""
    evaluated_NB: NDArray[np.bool_]
    """Whether each budget was evaluated, including that of the returned answer."""


class PolicyResult(NamedTuple):
    """A policy's score and costs, as means over splits with paired draws."""

    score: Estimate
    """Score, on the paper's scale."""
    answer_tokens: Estimate
    """Visual tokens per image of the pass whose answer is returned."""
    tokens: Estimate
    """Visual tokens per image, summed over all passes."""
    gflops: Estimate
    """GFLOPs per question, of the vision tower and all passes."""


class EscalationRule(NamedTuple):
    """The rule "answer at the smallest budget, and escalate while the confidence is low"."""

    budgets: tuple[int, ...]
    """Indices of the budgets to try, ascending."""
    threshold: float
    """Probability of a correct answer below which the next budget is tried."""


def fixed(table: BudgetTable, index: int) -> Choices:
    """Chooses one budget for all questions."""
    evaluated_NB = np.zeros(table.values_NB.shape, dtype=bool)
    evaluated_NB[:, index] = True
    return Choices(np.full(len(evaluated_NB), index), evaluated_NB)


def escalate(table: BudgetTable, rule: EscalationRule, chances_NB: Floats) -> Choices:
    """Tries larger budgets while the calibrated confidence of the last answer is below the threshold.

    The costs include every budget that is tried.

    Args:
        table: the answers.
        rule: the budgets to try, and the threshold.
        chances_NB: calibrated confidence of each answer.
    """
    evaluated_NB = np.zeros(table.values_NB.shape, dtype=bool)
    chosen_N = np.full(len(evaluated_NB), rule.budgets[0])
    going_N = np.ones(len(evaluated_NB), dtype=bool)
    for budget in rule.budgets:
        evaluated_NB[going_N, budget] = True
        chosen_N[going_N] = budget
        going_N = going_N & (chances_NB[:, budget] < rule.threshold)
    return Choices(chosen_N, evaluated_NB)


def predict(
    table: BudgetTable,
    predictors: Sequence[BudgetPredictor],
    folds_N: NDArray[np.int64],
    signals_NS: Floats,
    price: float,
) -> Choices:
    """Lets predictors choose, each for the questions of the fold that it was not fitted on.

    Args:
        table: the answers.
        predictors: one per fold, fitted on the other folds.
        folds_N: fold of each question.
        signals_NS: signals of each question.
        price: see `BudgetPredictor`.
    """
    chosen_N = np.zeros(len(folds_N), dtype=np.int64)
    for fold, predictor in enumerate(predictors):
        chosen_N[folds_N == fold] = predictor.choose_all(signals_NS[folds_N == fold], price=price)
    evaluated_NB = np.zeros(table.values_NB.shape, dtype=bool)
    evaluated_NB[np.arange(len(chosen_N)), chosen_N] = True
    if predictors[0].reads_answer:
        evaluated_NB[:, 0] = True
    return Choices(chosen_N, evaluated_NB)


def oracle(table: BudgetTable, price: float) -> Choices:
    """Chooses with knowledge of every value: an upper bound of all policies with one pass per question."""
    worth_NB = table.values_NB - price * np.array(table.budgets)
    chosen_N = worth_NB.argmax(axis=1)
    evaluated_NB = np.zeros(table.values_NB.shape, dtype=bool)
    evaluated_NB[np.arange(len(chosen_N)), chosen_N] = True
    return Choices(chosen_N, evaluated_NB)


class PolicyScorer:
    """Computes scores and costs of policies on one table, with joint draws over the scenes for all policies.

    Args:
        table: the answers.
        seed: seed of the draws.
        draws: number of draws.
    """

    def __init__(self, table: BudgetTable, seed: int = 0, draws: int = DRAWS) -> None:
        self._table = table
        self._seed = seed
        self._draws = draws
        splits = np.array(table.splits)
        self._members = {split: np.flatnonzero(splits == split) for split in dict.fromkeys(table.splits)}

    def score(self, choices: Choices, choosing_flops: float = 0.0) -> PolicyResult:
        """Computes the score and the costs of a policy, as unweighted means over splits.

        Args:
            choices: the choices of the policy.
            choosing_flops: FLOPs of the policy itself, per question.
        """
        table = self._table
        tokens_B, rows_N = np.array(table.budgets, dtype=np.float64), np.arange(len(choices.chosen_N))
        values_N = table.values_NB[rows_N, choices.chosen_N]
        costs = (
            tokens_B[choices.chosen_N],
            choices.evaluated_NB @ tokens_B,
            (table.encoding_N + (choices.evaluated_NB * table.passes_NB).sum(axis=1) + choosing_flops) / 1e9,
        )
        rows = []
        for split, members in self._members.items():
            scenes = [table.scenes[index] for index in members]
            # CIDEr's values reach 10.
            share = bool(table.values_NB[members].max() <= 1)
            key = zlib.crc32(choices.chosen_N[members].tobytes())
            rows.append(ClusteredValues(values_N[members].tolist(), scenes, table.scales[split], share, key))
            rows += [ClusteredValues(cost_N[members].tolist(), scenes, share=False) for cost_N in costs]
        found = estimate_means(rows, self._seed, self._draws)
        return PolicyResult(*(mean_of(found[column :: 1 + len(costs)]) for column in range(1 + len(costs))))


def mixture_at(cost: Estimate, fixed_costs: Sequence[Estimate], fixed_scores: Sequence[Estimate]) -> Estimate:
    """Estimates the score of the best random mixture of two fixed budgets at a mean cost, with paired draws.

    Choosing the budget of each question at random needs no signals, so a policy must exceed this baseline to be useful.
    """
    value = best_mixture(
        np.array([cost.value]), *(np.array([[each.value] for each in part]) for part in (fixed_costs, fixed_scores))
    )
    draws = best_mixture(cost.draws, *(np.stack([each.draws for each in part]) for part in (fixed_costs, fixed_scores)))
    return Estimate(float(value[0]), draws, cost.n)


def calibrated(table: BudgetTable, calibrations: Sequence[Sequence[Calibration]], folds_N: NDArray[np.int64]) -> Floats:
    """Computes the probability that each answer is correct, by calibrations that were fitted on the other folds.

    Args:
        table: the answers.
        calibrations: calibrations by fold and budget.
        folds_N: fold of each question.
    """
    chances_NB = np.zeros(table.values_NB.shape)
    for fold, by_budget in enumerate(calibrations):
        inside = folds_N == fold
        for index, calibration in enumerate(by_budget):
            chances_NB[inside, index] = calibration(table.confidence_NB[inside, index])
    return chances_NB


def best_mixture(cost_X: Floats, costs_BX: Floats, scores_BX: Floats) -> Floats:
    """Computes the highest score at each cost on any line between two points.

    Above the cost of the most expensive point, it is the score of that point. X are costs, or draws of one cost, each
    with the costs and scores of its own points.
    """
    best_X = np.where(
        cost_X >= costs_BX.max(axis=0), np.take_along_axis(scores_BX, costs_BX.argmax(axis=0)[None], axis=0)[0], -np.inf
    )
    for low in range(len(costs_BX)):
        for high in range(len(costs_BX)):
            gap_X = costs_BX[high] - costs_BX[low]
            share_X = np.divide(cost_X - costs_BX[low], gap_X, out=np.zeros_like(cost_X), where=gap_X > 0)
            between_X = scores_BX[low] + share_X * (scores_BX[high] - scores_BX[low])
            inside_X = (cost_X >= costs_BX[low]) & (cost_X <= costs_BX[high])
            best_X = np.where(inside_X, np.maximum(best_X, between_X), best_X)
    return np.where(np.isfinite(best_X), best_X, np.nan)
