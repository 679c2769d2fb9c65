"""Budgets chosen per image and question from the predictions of a split search on a tiny supernet."""

from dataclasses import replace
from pathlib import Path

import pytest

from parcelray.config.evaluate import EvaluateJob
from parcelray.errors import UserError
from parcelray.evaluation.adaptive.adaptive_budget import BEFORE, FIXED
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.tuning.evaluate_trial import EvaluatedPoint, WarmEvaluator
from parcelray.tuning.results import frontier_curves, study_split_search

from ..tiny import own_benchmark, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("without_pictures")


def _evaluator(storage: Path, model: Path, data: Path) -> WarmEvaluator:
    content = {
        "kind": "evaluate",
        "name": "e",
        "model": {"reference": str(model)},
        "benchmarks": [{"name": "own", "data": str(data)}],
        "catalog": [str(data / "own.yaml")],
        "budgets": [16],
        "compute": {"actors": 0},
        "tracking": {"uri": None},
        "storage": str(storage),
    }
    return WarmEvaluator(EvaluateJob.model_validate(content), {str(model): resolve_checkpoint(str(model))}, ((), 0))


def _point(evaluator: WarmEvaluator, anchor_grid: int, budget: int) -> EvaluatedPoint:
    return evaluator.evaluate({"anchor_grid": anchor_grid, "budgets": [budget]})


def test_each_budget_uses_its_chosen_split_and_is_scored_as_in_the_search(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, 4, connector={"type": "parcel", "num_heads": 2, "anchor_grids": [0, 2, 4, 8]})
    # An untrained model is never correct. So its answer at 16 tokens becomes the ground truth of every other sample.
    before = _evaluator(tmp_path / "before", model, own_benchmark(tmp_path / "a", [["nothing"]] * 40))
    predicted = [answer.text for answer in _point(before, 4, 16).splits[0].answers[16]]
    assert all(predicted), "an empty ground truth cannot be scored"
    data = own_benchmark(tmp_path / "b", [[text if number % 2 else "nothing"] for number, text in enumerate(predicted)])
    evaluator = _evaluator(tmp_path, model, data)
    points = {64: _point(evaluator, 8, 64), 16: _point(evaluator, 4, 16)}
    evaluator.reference = (points[16].splits, 16)
    study = study_split_search(points, evaluator, "retention")
    assert study.budgets == (16, 64)
    spent = {point.setting: point.spent for point in study.curve(FIXED)}
    assert {budget: each.score.value for budget, each in spent.items()} == pytest.approx(
        {budget: evaluator.estimate(points[budget], budget, "retention").value for budget in (16, 64)}
    )
    assert spent[16].score.value == pytest.approx(100)
    assert [each.tokens.value for each in spent.values()] == [16, 64]
    curves = frontier_curves(study)
    assert list(curves) == ["mixture of the chosen splits", "budget by predictor", "escalate 16 > 64"]
    assert curves["mixture of the chosen splits"][0] == pytest.approx((16, 100))
    assert curves["budget by predictor"] == [
        (point.spent.tokens.value, point.spent.score.value) for point in study.curve(BEFORE)
    ]
    assert max(tokens for tokens, _ in curves["escalate 16 > 64"]) <= 16 + 64

    by_score = study_split_search({**points, 64: _point(evaluator, 0, 64)}, evaluator, "score")
    other = {point.setting: point.spent for point in by_score.curve(FIXED)}
    assert other[16].score.value == pytest.approx(50)
    assert other[16].gflops.value == spent[16].gflops.value
    assert other[64].gflops.value != spent[64].gflops.value, "the compute of the connector is that of the chosen split"

    (split,) = points[16].splits
    nothing = replace(split.scores[16], estimate=replace(split.scores[16].estimate, value=0.0))
    evaluator.reference = ([replace(split, scores={16: nothing})], 16)
    with pytest.raises(UserError, match=r"The reference scores 0 on every split, so retention is undefined"):
        study_split_search(points, evaluator, "retention")
