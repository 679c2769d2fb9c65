"""Policies on made-up answers: the answers that each gives, its costs, and cross-fitting."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from parcelray.errors import UserError
from parcelray.evaluation.adaptive.adaptive_budget import (
    AFTER,
    BEFORE,
    FIXED,
    IMAGE,
    ORACLE,
    QUESTION,
    AdaptiveStudy,
    Signals,
    study_adaptive_budgets,
)
from parcelray.evaluation.adaptive.budget_policies import (
    BudgetTable,
    EscalationRule,
    PolicyScorer,
    best_mixture,
    escalate,
    fixed,
    mixture_at,
    oracle,
)
from parcelray.evaluation.adaptive.budget_signals import answer_signals
from parcelray.evaluation.scoring.split_scores import GivenAnswer

BUDGETS = (16, 64, 256)


def _table(
    values_NB: NDArray[np.float64],
    splits: tuple[str, ...] | None = None,
    log_probs_NB: NDArray[np.float64] | None = None,
) -> BudgetTable:
    count = len(values_NB)
    return BudgetTable(
        budgets=BUDGETS,
        splits=splits or ("a",) * count,
        scenes=tuple(f"scene {index // 2}" for index in range(count)),
        values_NB=values_NB,
        scales=dict.fromkeys(splits or ("a",), 100.0),
        log_probs_NB=np.zeros(values_NB.shape) if log_probs_NB is None else log_probs_NB,
        encoding_N=np.full(count, 5e9),
        passes_NB=np.tile(np.array([1e9, 2e9, 8e9]), (count, 1)),
    )


VALUES = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=np.float64)


def test_the_cost_of_an_escalation_includes_every_pass() -> None:
    table = _table(VALUES)
    chances_NB = np.array([[0.9, 0.9, 0.9], [0.1, 0.9, 0.9], [0.1, 0.1, 0.9], [0.1, 0.1, 0.1]])
    choices = escalate(table, EscalationRule((0, 1, 2), 0.5), chances_NB)
    assert choices.chosen_N.tolist() == [0, 1, 2, 2]
    spent = PolicyScorer(table, draws=50).score(choices)
    assert spent.score.value == pytest.approx(75)
    assert spent.answer_tokens.value == pytest.approx((16 + 64 + 256 + 256) / 4)
    assert spent.tokens.value == pytest.approx((16 + 80 + 336 + 336) / 4)
    # The vision tower runs once, however many passes follow.
    assert spent.gflops.value == pytest.approx(5 + (1 + 3 + 11 + 11) / 4)
    straight = escalate(table, EscalationRule((0, 2), 0.5), chances_NB)
    assert PolicyScorer(table, draws=50).score(straight).tokens.value == pytest.approx((16 + 3 * 272) / 4)


def test_the_oracle_chooses_the_smallest_budget_that_is_needed() -> None:
    table = _table(VALUES)
    assert oracle(table, 0.0).chosen_N.tolist() == [0, 1, 2, 0]
    # At this price, a correct answer is worth 48 more tokens, but not 240.
    assert oracle(table, 0.01).chosen_N.tolist() == [0, 1, 0, 0]


def test_scores_and_costs_are_means_over_splits() -> None:
    table = _table(
        np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]], dtype=np.float64), splits=("a", "b", "b", "b")
    )
    spent = PolicyScorer(table, draws=50).score(fixed(table, 0))
    assert spent.score.value == pytest.approx(50)
    assert spent.tokens.value == 16


def test_the_mixture_is_the_best_line_between_fixed_budgets() -> None:
    costs, scores = np.array([[16.0], [64.0], [256.0]]), np.array([[20.0], [21.0], [50.0]])
    at = np.array([16.0, 64.0, 136.0, 256.0, 300.0])
    found = best_mixture(at, np.tile(costs, 5), np.tile(scores, 5))
    # 64 tokens lie below the line from 16 to 256, so the best mixture never uses them.
    np.testing.assert_allclose(found, [20, 26, 35, 50, 50])
    table = _table(VALUES)
    scorer = PolicyScorer(table, draws=200)
    points = [scorer.score(fixed(table, index)) for index in range(3)]
    at_budget = mixture_at(points[1].tokens, [each.tokens for each in points], [each.score for each in points])
    assert at_budget.value == pytest.approx(points[1].score.value)


def _made_up(count: int = 400, seed: int = 0) -> tuple[BudgetTable, Signals]:
    """Questions with a signal that reveals the needed budget, and a confidence that is correlated with it."""
    rng = np.random.default_rng(seed)
    needed_N = rng.integers(0, 4, count)
    correct_NB = needed_N[:, None] <= np.arange(3)
    signal_N = needed_N + rng.normal(scale=0.3, size=count)
    log_probs_NB = np.where(correct_NB, -0.2, -0.6) + rng.normal(scale=0.1, size=correct_NB.shape)
    table = _table(correct_NB.astype(np.float64), log_probs_NB=log_probs_NB)
    answers = [
        GivenAnswer("x", num_new_tokens=2, mean_log_prob=float(each), entropy=0.5) for each in log_probs_NB[:, 0]
    ]
    before_NS = np.stack([signal_N, rng.normal(size=count)], axis=1)
    return table, Signals(
        before_NS,
        ("image_mean_0", "question_0"),
        answer_signals(answers),
        ("answer_a", "answer_b", "answer_c", "answer_d"),
    )


@pytest.fixture(scope="module")
def study() -> AdaptiveStudy:
    return study_adaptive_budgets(*_made_up(), keep_within=5)


def test_predictors_beat_a_random_mixture_and_nothing_beats_the_oracle(study: AdaptiveStudy) -> None:
    best = {method: max(point.gain_at_tokens.interval.low for point in study.curve(method)) for method in study.methods}
    assert best[BEFORE] > 5
    assert best[AFTER] > 5
    assert best[IMAGE] > 5
    assert best[QUESTION] < 1, "the question's only signal is noise"
    assert best["escalate 16 > 256"] > 0
    assert best[ORACLE] == max(best.values())
    assert all(point.gain_at_tokens.value == pytest.approx(0) for point in study.curve(FIXED))


def test_random_signals_gain_nothing() -> None:
    """With random signals, a predictor has a spurious gain on the questions of its fit; a cross-fitted one has none."""
    table, signals = _made_up(200)
    noise = np.random.default_rng(3).normal(size=(200, 60))
    names = tuple(f"{part}_{index}" for part in ("image", "question") for index in range(30))
    study = study_adaptive_budgets(table, Signals(noise, names, signals.answer_NS, signals.answer_names), keep_within=5)
    gains = [point.gain_at_tokens.interval for method in (BEFORE, QUESTION, IMAGE) for point in study.curve(method)]
    assert all(gain.low <= 0.5 for gain in gains)


def test_the_price_for_serving_keeps_the_score(study: AdaptiveStudy) -> None:
    full = max(study.curve(FIXED), key=lambda point: point.setting)
    for method, predictor in study.predictors.items():
        (own,) = (point for point in study.curve(method) if point.setting == predictor.price)
        assert own.spent.score.value >= 0.95 * full.spent.score.value
    own_price = study.predictors[BEFORE].price
    assert own_price > 0
    assert {predictor.reads_answer for method, predictor in study.predictors.items() if method != AFTER} == {False}
    assert study.predictors[AFTER].reads_answer


def test_isotonic_maps_reduce_the_calibration_error_and_are_monotonic(study: AdaptiveStudy) -> None:
    for each in study.calibration:
        assert each.with_isotonic < each.raw
        assert each.auroc > 0.9
    data = study.to_dict()
    assert len(data["points"]) == len(study.points)
    assert data["isotonic_maps"].keys() == {"16", "64", "256"}


def test_too_few_scenes_or_budgets_are_refused() -> None:
    table, signals = _made_up(12)
    with pytest.raises(UserError, match=r"6 scenes at the budgets .* evaluate at least two budgets on 10 scenes"):
        study_adaptive_budgets(table, signals, keep_within=5)
    table, signals = _made_up(100)
    one = dataclasses.replace(table, budgets=(16,))
    with pytest.raises(UserError, match="are too few for a study of adaptive budgets"):
        study_adaptive_budgets(one, signals, keep_within=5)
