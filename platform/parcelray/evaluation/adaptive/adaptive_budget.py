"""Choosing the budget per image and question, measured: a rule and predictors against fixed budgets at equal cost.

Nothing is judged by what it was fitted on: scenes are dealt into folds, and calibrations and predictors that answer for
a fold have seen only the others. Every pass that a policy makes is paid. The baseline is the best random mixture of
fixed budgets, a coin that needs no signals.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from parcelray.errors import UserError
from parcelray.evaluation.adaptive.budget_policies import (
    Accounts,
    BudgetTable,
    Choices,
    Ladder,
    Spent,
    calibrated,
    escalate,
    fixed,
    mixture_at,
    oracle,
    predict,
)
from parcelray.evaluation.adaptive.budget_predictor import BudgetPredictor, Learning, fit_predictor
from parcelray.evaluation.adaptive.calibration import (
    Calibration,
    ReliabilityBin,
    calibration_error,
    cool,
    fit_isotonic,
    fit_temperature,
    folds_by_group,
    reliability,
)
from parcelray.evaluation.scoring.aggregate import difference
from parcelray.evaluation.scoring.split_scores import Estimate

FIXED, ORACLE, BEFORE, AFTER = "fixed", "oracle", "predictor", "predictor after the smallest"
IMAGE, QUESTION = "predictor, image alone", "predictor, question alone"
FOLDS = 5
THRESHOLDS = (*(round(0.025 * step, 3) for step in range(1, 20)), *(round(0.05 * step, 2) for step in range(10, 20)))
"""Denser where a hard benchmark has its chances."""
PRICES = (0.0, *(float(price) for price in np.geomspace(1e-5, 3e-2, 20).round(7)))
_LEARNING = Learning()

Floats = NDArray[np.float64]


class CurvePoint(NamedTuple):
    """A policy at one setting."""

    method: str
    setting: float
    """Visual tokens of a fixed budget, threshold of a rule, price of a predictor or of the oracle."""
    spent: Spent
    gain_at_tokens: Estimate
    """Score minus that of the best mixture of fixed budgets at as many visual tokens in all passes, paired."""
    gain_at_flops: Estimate
    """The same at as many FLOPs."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "method": self.method,
            "setting": self.setting,
            **{name: each.interval._asdict() for name, each in self.spent._asdict().items()},
            "gain_at_tokens": self.gain_at_tokens.interval._asdict(),
            "gain_at_flops": self.gain_at_flops.interval._asdict(),
        }


class BudgetCalibration(NamedTuple):
    """How well confidence tells right answers from wrong ones at one budget; fitted maps are judged on folds that they have not seen."""

    num_visual_tokens: int
    raw: float
    """Expected calibration error of the geometric mean of an answer's token probabilities."""
    with_temperature: float
    with_isotonic: float
    temperature: float
    """Mean over folds."""
    auroc: float
    """Chance that a right answer has more confidence than a wrong one; NaN where all are right or wrong."""
    bins: tuple[ReliabilityBin, ...]
    """Without a map."""
    isotonic_bins: tuple[ReliabilityBin, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        own = {
            "bins": [each._asdict() for each in self.bins],
            "isotonic_bins": [each._asdict() for each in self.isotonic_bins],
        }
        return self._asdict() | own | {"auroc": None if math.isnan(self.auroc) else self.auroc}


@dataclass(frozen=True)
class AdaptiveStudy:
    """What input-adaptive budgets are worth on one evaluation."""

    budgets: tuple[int, ...]
    questions: int
    points: tuple[CurvePoint, ...]
    calibration: tuple[BudgetCalibration, ...]
    maps: tuple[Calibration, ...]
    """By budget, fitted on everything: for serving."""
    predictors: Mapping[str, BudgetPredictor]
    """By method, fitted on everything: for serving.

    Their price is the highest that keeps the score, see `study_adaptive_budgets`.
    """

    def curve(self, method: str) -> list[CurvePoint]:
        """A method's points, the cheapest first."""
        return sorted(
            (point for point in self.points if point.method == method), key=lambda point: point.spent.tokens.value
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order of the study, fixed budgets first."""
        return tuple(dict.fromkeys(point.method for point in self.points))

    @property
    def escalation(self) -> str:
        """The method that goes up over all budgets."""
        return _ladder_name(self.budgets)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "budgets": list(self.budgets),
            "questions": self.questions,
            "folds": FOLDS,
            "points": [point.to_dict() for point in self.points],
            "calibration": [each.to_dict() for each in self.calibration],
            "isotonic_maps": {
                str(budget): each.to_dict() for budget, each in zip(self.budgets, self.maps, strict=True)
            },
            "prices": {method: each.price for method, each in self.predictors.items()},
        }


class Signals(NamedTuple):
    """What predictors are told of the questions of a table."""

    before_NS: Floats
    """What is known before any answer."""
    before_names: tuple[str, ...]
    answer_NS: Floats
    """What the smallest budget's answer adds."""
    answer_names: tuple[str, ...]

    def told(self, method: str) -> tuple[Floats, tuple[str, ...]]:
        """The signals of a predictor, and their names."""
        if method == AFTER:
            return np.concatenate([self.before_NS, self.answer_NS], axis=1), self.before_names + self.answer_names
        if method == BEFORE:
            return self.before_NS, self.before_names
        of_image = [name.startswith("image_") or name == "num_images" for name in self.before_names]
        kept = [place for place, each in enumerate(of_image) if each == (method == IMAGE)]
        return self.before_NS[:, kept], tuple(self.before_names[place] for place in kept)


def study_adaptive_budgets(table: BudgetTable, signals: Signals, *, keep_within: float, seed: int = 0) -> AdaptiveStudy:
    """Sweeps every policy over its settings.

    Args:
        table: the answers of an evaluation at two budgets at least.
        signals: of the questions.
        keep_within: percent of the largest budget's score that a predictor may lose at its own price.
        seed: of folds and draws.

    Raises:
        UserError: there are too few budgets or scenes, or nothing to learn.
    """
    if len(table.budgets) < 2 or len(set(table.scenes)) < 2 * FOLDS:
        raise UserError(
            f"{len(set(table.scenes))} scenes at the budgets {', '.join(map(str, table.budgets))} are too few to choose"
            f" between budgets; evaluate at least two budgets on {2 * FOLDS} scenes."
        )
    folds_N = folds_by_group(table.scenes, FOLDS, seed)
    sweep = _Sweep(table, seed)
    for place, budget in enumerate(table.budgets):
        sweep.add(FIXED, budget, fixed(table, place))
    maps = [_maps(table, folds_N != fold) for fold in range(FOLDS)]
    chances_NB = calibrated(table, maps, folds_N)
    for rungs in _ladders(len(table.budgets)):
        name = _ladder_name(table.budgets[rung] for rung in rungs)
        for threshold in THRESHOLDS:
            sweep.add(name, threshold, escalate(table, Ladder(rungs, threshold), chances_NB))
    predictors = {}
    for method in (BEFORE, AFTER, QUESTION, IMAGE):
        told_NS, names = signals.told(method)
        fits = [_fit(table, told_NS, names, folds_N != fold, method) for fold in range(FOLDS)]
        for price in PRICES:
            sweep.add(method, price, predict(table, fits, folds_N, told_NS, price), fits[0].flops)
        kept = sweep.highest_setting(method, keep_within)
        predictors[method] = replace(_fit(table, told_NS, names, np.ones(len(folds_N), dtype=bool), method), price=kept)
    for price in PRICES:
        sweep.add(ORACLE, price, oracle(table, price))
    calibration = tuple(_calibration(table, place, chances_NB, folds_N) for place in range(len(table.budgets)))
    everything = _maps(table, np.ones(len(folds_N), dtype=bool))
    return AdaptiveStudy(table.budgets, len(folds_N), tuple(sweep.points), calibration, tuple(everything), predictors)


class _Sweep:
    """Collects the points of a study."""

    def __init__(self, table: BudgetTable, seed: int) -> None:
        self._accounts = Accounts(table, seed)
        fixed_spent = [self._accounts.of(fixed(table, place)) for place in range(len(table.budgets))]
        self._scores = [each.score for each in fixed_spent]
        self._tokens = [each.tokens for each in fixed_spent]
        self._gflops = [each.gflops for each in fixed_spent]
        self.points: list[CurvePoint] = []

    def add(self, method: str, setting: float, choices: Choices, choosing_flops: float = 0.0) -> None:
        spent = self._accounts.of(choices, choosing_flops)
        gains = [
            difference(spent.score, mixture_at(cost, costs, self._scores))
            for cost, costs in ((spent.tokens, self._tokens), (spent.gflops, self._gflops))
        ]
        self.points.append(CurvePoint(method, setting, spent, *gains))

    def highest_setting(self, method: str, keep_within: float) -> float:
        """The highest price whose score keeps within a percentage of the largest budget's; 0 where none does."""
        least = (1 - keep_within / 100) * self._scores[-1].value
        return max(
            (point.setting for point in self.points if point.method == method and point.spent.score.value >= least),
            default=0.0,
        )


def _ladder_name(budgets: Iterable[int]) -> str:
    return "escalate " + " > ".join(map(str, budgets))


def _ladders(count: int) -> list[tuple[int, ...]]:
    """From the smallest budget straight to each other one, and over all of them."""
    straight: list[tuple[int, ...]] = [(0, place) for place in range(1, count)]
    return [*straight, tuple(range(count))] if count > 2 else straight


def _maps(table: BudgetTable, inside_N: NDArray[np.bool_]) -> list[Calibration]:
    return [
        fit_isotonic(table.confidence_NB[inside_N, place], table.right_NB[inside_N, place].astype(float))
        for place in range(len(table.budgets))
    ]


def _fit(
    table: BudgetTable, told_NS: Floats, names: tuple[str, ...], inside_N: NDArray[np.bool_], method: str
) -> BudgetPredictor:
    return fit_predictor(
        told_NS[inside_N],
        table.right_NB[inside_N],
        budgets=table.budgets,
        names=names,
        reads_answer=method == AFTER,
        learning=_LEARNING,
    )


def _calibration(table: BudgetTable, place: int, chances_NB: Floats, folds_N: NDArray[np.int64]) -> BudgetCalibration:
    confidence_N, right_N = table.confidence_NB[:, place], table.right_NB[:, place].astype(float)
    cooled_N, temperatures = np.zeros(len(folds_N)), []
    for fold in range(FOLDS):
        inside = folds_N == fold
        temperatures.append(fit_temperature(confidence_N[~inside], right_N[~inside]))
        cooled_N[inside] = cool(confidence_N[inside], temperatures[-1])
    return BudgetCalibration(
        num_visual_tokens=table.budgets[place],
        raw=calibration_error(confidence_N, right_N),
        with_temperature=calibration_error(cooled_N, right_N),
        with_isotonic=calibration_error(chances_NB[:, place], right_N),
        temperature=float(np.mean(temperatures)),
        auroc=float(roc_auc_score(right_N, confidence_N)) if 0 < right_N.mean() < 1 else math.nan,
        bins=tuple(reliability(confidence_N, right_N)),
        isotonic_bins=tuple(reliability(chances_NB[:, place], right_N)),
    )


def nearest(points: Sequence[CurvePoint], tokens: float) -> CurvePoint:
    """The point whose visual tokens in all passes are nearest, as a ratio."""
    return min(points, key=lambda point: abs(math.log(point.spent.tokens.value / tokens)))
