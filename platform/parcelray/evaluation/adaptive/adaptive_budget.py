"""Measures the choice of a budget per image and question: a rule and predictors against fixed budgets at equal cost.

All fits are cross-fitted: scenes are divided into folds, and a fold uses calibrations and predictors that were fitted
on the other folds. The cost of a policy includes every pass that it makes. The baseline is the best random mixture of
fixed budgets, which needs no signals.
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
    BudgetTable,
    Choices,
    EscalationRule,
    PolicyResult,
    PolicyScorer,
    calibrated,
    escalate,
    fixed,
    mixture_at,
    oracle,
    predict,
)
from parcelray.evaluation.adaptive.budget_predictor import BudgetPredictor, FitSettings, fit_predictor
from parcelray.evaluation.adaptive.calibration import (
    Calibration,
    ReliabilityBin,
    apply_temperature,
    calibration_error,
    fit_isotonic,
    fit_temperature,
    folds_by_group,
    reliability,
)
from parcelray.evaluation.scoring.estimate import Estimate, difference

FIXED, ORACLE, BEFORE, AFTER = "fixed", "oracle", "predictor", "predictor after the smallest"
IMAGE, QUESTION = "predictor, image alone", "predictor, question alone"
FOLDS = 5
THRESHOLDS = (*(round(0.025 * step, 3) for step in range(1, 20)), *(round(0.05 * step, 2) for step in range(10, 20)))
"""Thresholds of the escalation rule; denser at low values, where the probabilities of hard benchmarks lie."""
PRICES = (0.0, *(float(price) for price in np.geomspace(1e-5, 3e-2, 20).round(7)))
_FIT = FitSettings()

Floats = NDArray[np.float64]


class CurvePoint(NamedTuple):
    """A policy's score and costs at one setting."""

    method: str
    setting: float
    """Visual tokens of a fixed budget, threshold of the rule, or price of a predictor or of the oracle."""
    spent: PolicyResult
    gain_at_tokens: Estimate
    """Paired gain in score over the best mixture of fixed budgets with as many visual tokens in all passes."""
    gain_at_flops: Estimate
    """Paired gain in score over the best mixture of fixed budgets with as many FLOPs."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the values as JSON-serialisable data."""
        return {
            "method": self.method,
            "setting": self.setting,
            **{name: each.interval._asdict() for name, each in self.spent._asdict().items()},
            "gain_at_tokens": self.gain_at_tokens.interval._asdict(),
            "gain_at_flops": self.gain_at_flops.interval._asdict(),
        }


class BudgetCalibration(NamedTuple):
    """The calibration of confidence at one budget; fitted maps are evaluated on folds that they were not fitted on."""

    num_visual_tokens: int
    raw: float
    """Expected calibration error of the confidence, the geometric mean of an answer's token probabilities."""
    with_temperature: float
    with_isotonic: float
    temperature: float
    """Fitted temperature, mean over folds."""
    auroc: float
    """Probability that a correct answer has more confidence than a wrong one; NaN if all are correct or all wrong."""
    bins: tuple[ReliabilityBin, ...]
    """Bins of the raw confidence."""
    isotonic_bins: tuple[ReliabilityBin, ...]
    """Bins of the confidence after isotonic regression."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the values as JSON-serialisable data."""
        own = {
            "bins": [each._asdict() for each in self.bins],
            "isotonic_bins": [each._asdict() for each in self.isotonic_bins],
        }
        return self._asdict() | own | {"auroc": None if math.isnan(self.auroc) else self.auroc}


@dataclass(frozen=True)
class AdaptiveStudy:
    """Results of input-adaptive budgets on one evaluation."""

    budgets: tuple[int, ...]
    questions: int
    points: tuple[CurvePoint, ...]
    calibration: tuple[BudgetCalibration, ...]
    maps: tuple[Calibration, ...]
    """Calibration by budget, fitted on all questions, for serving."""
    predictors: Mapping[str, BudgetPredictor]
    """Predictor by method, fitted on all questions, for serving.

    Their price is the highest that keeps the score, see `study_adaptive_budgets`.
    """

    def curve(self, method: str) -> list[CurvePoint]:
        """Returns a method's points, the cheapest first."""
        return sorted(
            (point for point in self.points if point.method == method), key=lambda point: point.spent.tokens.value
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods in the order of the study, fixed budgets first."""
        return tuple(dict.fromkeys(point.method for point in self.points))

    @property
    def escalation(self) -> str:
        """Name of the method that escalates through all budgets."""
        return _escalation_name(self.budgets)

    def to_dict(self) -> dict[str, Any]:
        """Returns the values as JSON-serialisable data."""
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
    """The signals of the questions of a table."""

    before_NS: Floats
    """Signals of images and questions, known before any answer."""
    before_names: tuple[str, ...]
    answer_NS: Floats
    """Signals of the smallest budget's answer."""
    answer_names: tuple[str, ...]

    def of_method(self, method: str) -> tuple[Floats, tuple[str, ...]]:
        """Returns the signals that the predictor of a method reads, and their names."""
        if method == AFTER:
            return np.concatenate([self.before_NS, self.answer_NS], axis=1), self.before_names + self.answer_names
        if method == BEFORE:
            return self.before_NS, self.before_names
        of_image = [name.startswith("image_") or name == "num_images" for name in self.before_names]
        kept = [index for index, each in enumerate(of_image) if each == (method == IMAGE)]
        return self.before_NS[:, kept], tuple(self.before_names[index] for index in kept)


def study_adaptive_budgets(table: BudgetTable, signals: Signals, *, keep_within: float, seed: int = 0) -> AdaptiveStudy:
    """Evaluates every policy at all its settings.

    Args:
        table: answers of an evaluation at two budgets or more.
        signals: signals of the questions.
        keep_within: percent of the largest budget's score that a predictor may lose at its default price.
        seed: seed of the folds and the draws.

    Raises:
        UserError: there are too few budgets or scenes, or every budget is correct on all questions or on none.
    """
    if len(table.budgets) < 2 or len(set(table.scenes)) < 2 * FOLDS:
        raise UserError(
            f"{len(set(table.scenes))} scenes at the budgets {', '.join(map(str, table.budgets))} are too few for"
            f" a study of adaptive budgets; evaluate at least two budgets on {2 * FOLDS} scenes."
        )
    folds_N = folds_by_group(table.scenes, FOLDS, seed)
    sweep = _Sweep(table, seed)
    for index, budget in enumerate(table.budgets):
        sweep.add(FIXED, budget, fixed(table, index))
    maps = [_maps(table, folds_N != fold) for fold in range(FOLDS)]
    chances_NB = calibrated(table, maps, folds_N)
    for indices in _escalations(len(table.budgets)):
        name = _escalation_name(table.budgets[index] for index in indices)
        for threshold in THRESHOLDS:
            sweep.add(name, threshold, escalate(table, EscalationRule(indices, threshold), chances_NB))
    predictors = {}
    for method in (BEFORE, AFTER, QUESTION, IMAGE):
        read_NS, names = signals.of_method(method)
        fits = [_fit(table, read_NS, names, folds_N != fold, method) for fold in range(FOLDS)]
        for price in PRICES:
            sweep.add(method, price, predict(table, fits, folds_N, read_NS, price), fits[0].flops)
        kept = sweep.highest_setting(method, keep_within)
        predictors[method] = replace(_fit(table, read_NS, names, np.ones(len(folds_N), dtype=bool), method), price=kept)
    for price in PRICES:
        sweep.add(ORACLE, price, oracle(table, price))
    calibration = tuple(_calibration(table, index, chances_NB, folds_N) for index in range(len(table.budgets)))
    final_maps = _maps(table, np.ones(len(folds_N), dtype=bool))
    return AdaptiveStudy(table.budgets, len(folds_N), tuple(sweep.points), calibration, tuple(final_maps), predictors)


class _Sweep:
    """Collects the points of a study, with the gains over mixtures of fixed budgets."""

    def __init__(self, table: BudgetTable, seed: int) -> None:
        self._scorer = PolicyScorer(table, seed)
        fixed_spent = [self._scorer.score(fixed(table, index)) for index in range(len(table.budgets))]
        self._scores = [each.score for each in fixed_spent]
        self._tokens = [each.tokens for each in fixed_spent]
        self._gflops = [each.gflops for each in fixed_spent]
        self.points: list[CurvePoint] = []

    def add(self, method: str, setting: float, choices: Choices, choosing_flops: float = 0.0) -> None:
        spent = self._scorer.score(choices, choosing_flops)
        gains = [
            difference(spent.score, mixture_at(cost, costs, self._scores))
            for cost, costs in ((spent.tokens, self._tokens), (spent.gflops, self._gflops))
        ]
        self.points.append(CurvePoint(method, setting, spent, *gains))

    def highest_setting(self, method: str, keep_within: float) -> float:
        """Returns the highest price with a score within a percentage of the largest budget's; 0 if there is none."""
        least = (1 - keep_within / 100) * self._scores[-1].value
        return max(
            (point.setting for point in self.points if point.method == method and point.spent.score.value >= least),
            default=0.0,
        )


def _escalation_name(budgets: Iterable[int]) -> str:
    return "escalate " + " > ".join(map(str, budgets))


def _escalations(count: int) -> list[tuple[int, ...]]:
    """Budget indices to try: from the smallest directly to each other budget, and through all budgets."""
    direct: list[tuple[int, ...]] = [(0, index) for index in range(1, count)]
    return [*direct, tuple(range(count))] if count > 2 else direct


def _maps(table: BudgetTable, inside_N: NDArray[np.bool_]) -> list[Calibration]:
    return [
        fit_isotonic(table.confidence_NB[inside_N, index], table.correct_NB[inside_N, index].astype(float))
        for index in range(len(table.budgets))
    ]


def _fit(
    table: BudgetTable, read_NS: Floats, names: tuple[str, ...], inside_N: NDArray[np.bool_], method: str
) -> BudgetPredictor:
    return fit_predictor(
        read_NS[inside_N],
        table.correct_NB[inside_N],
        budgets=table.budgets,
        names=names,
        reads_answer=method == AFTER,
        settings=_FIT,
    )


def _calibration(table: BudgetTable, index: int, chances_NB: Floats, folds_N: NDArray[np.int64]) -> BudgetCalibration:
    confidence_N, correct_N = table.confidence_NB[:, index], table.correct_NB[:, index].astype(float)
    scaled_N, temperatures = np.zeros(len(folds_N)), []
    for fold in range(FOLDS):
        inside = folds_N == fold
        temperatures.append(fit_temperature(confidence_N[~inside], correct_N[~inside]))
        scaled_N[inside] = apply_temperature(confidence_N[inside], temperatures[-1])
    return BudgetCalibration(
        num_visual_tokens=table.budgets[index],
        raw=calibration_error(confidence_N, correct_N),
        with_temperature=calibration_error(scaled_N, correct_N),
        with_isotonic=calibration_error(chances_NB[:, index], correct_N),
        temperature=float(np.mean(temperatures)),
        auroc=float(roc_auc_score(correct_N, confidence_N)) if 0 < correct_N.mean() < 1 else math.nan,
        bins=tuple(reliability(confidence_N, correct_N)),
        isotonic_bins=tuple(reliability(chances_NB[:, index], correct_N)),
    )


def nearest(points: Sequence[CurvePoint], tokens: float) -> CurvePoint:
    """Returns the point whose visual tokens in all passes are nearest to a number, by their ratio."""
    return min(points, key=lambda point: abs(math.log(point.spent.tokens.value / tokens)))
