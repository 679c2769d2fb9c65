"""What an evaluation says of choosing the budget question by question: the answers that every policy would have given, and all that it would have paid.

Shapes: N questions, B budgets, S scenes, R bootstrap draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parcelray.evaluation.adaptive.budget_predictor import BudgetPredictor
from parcelray.evaluation.adaptive.calibration import Calibration
from parcelray.evaluation.scoring.intervals import DRAWS
from parcelray.evaluation.scoring.split_scores import Estimate

_RIGHT = 0.5
"""Value from which an answer counts as right; most metrics know only 0 and 1."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BudgetTable:
    """Every budget's answer to every question of an evaluation."""

    budgets: tuple[int, ...]
    """Visual tokens per image, ascending, without the blind model."""
    splits: tuple[str, ...]
    """Of each question."""
    scenes: tuple[str, ...]
    """Of each question: what is drawn, and put into folds, together."""
    values_NB: Floats
    """What each answer is worth, on the metric's own scale."""
    scaled_NB: Floats
    """The same on the paper's scale."""
    log_probs_NB: Floats
    """Mean log-probability of each answer."""
    encoding_N: Floats
    """FLOPs of the vision tower, once for all budgets."""
    passes_NB: Floats
    """FLOPs of the rest of a pass: connector, prefill and decoding."""

    @property
    def right_NB(self) -> NDArray[np.bool_]:
        """Which answers are right."""
        return self.values_NB >= _RIGHT

    @property
    def confidence_NB(self) -> Floats:
        """Geometric mean of the probabilities of an answer's tokens."""
        return np.exp(self.log_probs_NB)


class Choices(NamedTuple):
    """What a policy did with every question."""

    chosen_N: NDArray[np.int64]
    """Place of the budget whose answer is given."""
    asked_NB: NDArray[np.bool_]
    """Which budgets were asked on the way, that of the answer included."""


class Spent(NamedTuple):
    """A policy's score and costs, as means over splits whose draws belong together."""

    score: Estimate
    """On the paper's scale."""
    answer_tokens: Estimate
    """Visual tokens per image of the pass whose answer is given."""
    tokens: Estimate
    """Visual tokens per image of all passes."""
    gflops: Estimate
    """Of the vision tower and all passes, per question."""


class Ladder(NamedTuple):
    """The rule "answer at the smallest budget, and go up while the confidence is low"."""

    rungs: tuple[int, ...]
    """Places of the budgets, ascending."""
    threshold: float
    """Chance of being right below which it goes on."""


def fixed(table: BudgetTable, place: int) -> Choices:
    """One budget for everything."""
    asked_NB = np.zeros(table.values_NB.shape, dtype=bool)
    asked_NB[:, place] = True
    return Choices(np.full(len(asked_NB), place), asked_NB)


def escalate(table: BudgetTable, ladder: Ladder, chances_NB: Floats) -> Choices:
    """Goes up the rungs while the calibrated chance of the answer just given is below the threshold; every rung that is tried is paid.

    Args:
        table: the answers.
        ladder: the rule.
        chances_NB: calibrated confidence of each answer.
    """
    asked_NB = np.zeros(table.values_NB.shape, dtype=bool)
    chosen_N = np.full(len(asked_NB), ladder.rungs[0])
    going_N = np.ones(len(asked_NB), dtype=bool)
    for rung in ladder.rungs:
        asked_NB[going_N, rung] = True
        chosen_N[going_N] = rung
        going_N = going_N & (chances_NB[:, rung] < ladder.threshold)
    return Choices(chosen_N, asked_NB)


def predict(
    table: BudgetTable,
    predictors: Sequence[BudgetPredictor],
    folds_N: NDArray[np.int64],
    signals_NS: Floats,
    price: float,
) -> Choices:
    """What predictors choose, each for the questions of the fold that it has not seen.

    Args:
        table: the answers.
        predictors: by fold, fitted on the other folds.
        folds_N: of the questions.
        signals_NS: of the questions.
        price: see `BudgetPredictor`.
    """
    chosen_N = np.zeros(len(folds_N), dtype=np.int64)
    for fold, predictor in enumerate(predictors):
        chosen_N[folds_N == fold] = predictor.choose_all(signals_NS[folds_N == fold], price=price)
    asked_NB = np.zeros(table.values_NB.shape, dtype=bool)
    asked_NB[np.arange(len(chosen_N)), chosen_N] = True
    if predictors[0].reads_answer:
        asked_NB[:, 0] = True
    return Choices(chosen_N, asked_NB)


def oracle(table: BudgetTable, price: float) -> Choices:
    """The chooser that knows every value beforehand: an upper bound on every policy that pays for one pass."""
    worth_NB = table.values_NB - price * np.array(table.budgets)
    chosen_N = worth_NB.argmax(axis=1)
    asked_NB = np.zeros(table.values_NB.shape, dtype=bool)
    asked_NB[np.arange(len(chosen_N)), chosen_N] = True
    return Choices(chosen_N, asked_NB)


class Accounts:
    """Scores and costs of policies on one table, with the same scenes drawn for all of them.

    Args:
        table: the answers.
        seed: of the draws.
        draws: how many.
    """

    def __init__(self, table: BudgetTable, seed: int = 0, draws: int = DRAWS) -> None:
        self._table = table
        names, owner_N = np.unique(np.array(table.scenes), return_inverse=True)
        self._counts_RS = (
            np.random.default_rng(seed)
            .multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
            .astype(np.float64)
        )
        splits = np.array(table.splits)
        self._members = [
            (places, owner_N[places])
            for places in (np.flatnonzero(splits == split) for split in dict.fromkeys(table.splits))
        ]

    def of(self, choices: Choices, choosing_flops: float = 0.0) -> Spent:
        """Score and costs of what a policy did.

        Args:
            choices: of the policy.
            choosing_flops: of the policy itself, per question.
        """
        table = self._table
        tokens_B, everyone = np.array(table.budgets, dtype=np.float64), np.arange(len(choices.chosen_N))
        columns = [
            table.scaled_NB[everyone, choices.chosen_N],
            tokens_B[choices.chosen_N],
            choices.asked_NB @ tokens_B,
            (table.encoding_N + (choices.asked_NB * table.passes_NB).sum(axis=1) + choosing_flops) / 1e9,
        ]
        return Spent(*self._means(np.stack(columns, axis=1)))

    def _means(self, values_NX: Floats) -> list[Estimate]:
        """Unweighted means over splits of each column."""
        value_X, draws_RX = np.zeros(values_NX.shape[1]), np.zeros((len(self._counts_RS), values_NX.shape[1]))
        for places, owner in self._members:
            sums_SX = np.zeros((self._counts_RS.shape[1], values_NX.shape[1]))
            np.add.at(sums_SX, owner, values_NX[places])
            totals_R = self._counts_RS @ np.bincount(owner, minlength=len(sums_SX)).astype(np.float64)
            sums_RX = self._counts_RS @ sums_SX
            draws_RX += np.divide(
                sums_RX, totals_R[:, None], out=np.full(sums_RX.shape, np.nan), where=totals_R[:, None] > 0
            ) / len(self._members)
            value_X += values_NX[places].mean(axis=0) / len(self._members)
        return [Estimate(float(value), draws_RX[:, column], len(values_NX)) for column, value in enumerate(value_X)]


def mixture_at(cost: Estimate, fixed_costs: Sequence[Estimate], fixed_scores: Sequence[Estimate]) -> Estimate:
    """What the best random mixture of two fixed budgets scores at a mean cost, drawn with the costs and scores that it is made of.

    A coin that picks the budget of each question needs no signals at all: a policy is worth something only above this
    line.
    """
    value = best_mixture(
        np.array([cost.value]), *(np.array([[each.value] for each in part]) for part in (fixed_costs, fixed_scores))
    )
    draws = best_mixture(cost.draws, *(np.stack([each.draws for each in part]) for part in (fixed_costs, fixed_scores)))
    return Estimate(float(value[0]), draws, cost.n)


def calibrated(table: BudgetTable, calibrations: Sequence[Sequence[Calibration]], folds_N: NDArray[np.int64]) -> Floats:
    """Each answer's chance of being right by the calibration of its budget that was fitted on the other folds.

    Args:
        table: the answers.
        calibrations: by fold and budget.
        folds_N: of the questions.
    """
    chances_NB = np.zeros(table.values_NB.shape)
    for fold, by_budget in enumerate(calibrations):
        inside = folds_N == fold
        for place, calibration in enumerate(by_budget):
            chances_NB[inside, place] = calibration(table.confidence_NB[inside, place])
    return chances_NB


def best_mixture(cost_X: Floats, costs_BX: Floats, scores_BX: Floats) -> Floats:
    """The highest score at each cost on any line between two of the points; beyond the dearest point its own score.

    X are costs, or draws of one cost, each with the costs and scores of its own points.
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
