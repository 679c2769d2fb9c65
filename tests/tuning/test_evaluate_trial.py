"""A warm evaluation has the results of `parcelray evaluate`, without loading the model and encoding images again."""

import io
import math
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import ConfigError, changed
from parcelray.config.paths import AS_WRITTEN
from parcelray.config.tune import TuneJob
from parcelray.errors import UserError
from parcelray.evaluation.run import run_evaluation
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.token_reduction.encoder_view import EncoderView
from parcelray.models.vlm import load_vlm
from parcelray.tuning.evaluate_trial import WarmEvaluator
from parcelray.tuning.results import Baseline, findings_of

from ..tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("without_pictures")
NUM_SAMPLES = 12
"""Samples of the mini suite, the same number from each of its four families."""


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("supernet"),
        3,
        connector={"type": "parcel", "num_heads": 2, "anchor_grids": [0, 1, 2, 4, 8, 16]},
    )


def _job(storage: Path, model: Path, **changes: Any) -> EvaluateJob:
    data = {
        "kind": "evaluate",
        "name": "e",
        "model": {"reference": str(model)},
        "benchmarks": [{"name": "mini", "source": {"samples": NUM_SAMPLES // 4}, "max_new_tokens": 3}],
        "budgets": [16, 256],
        "compute": {"actors": 0, "rows_per_shard": 8},
        "tracking": {"uri": None},
        "storage": str(storage),
    }
    return EvaluateJob.model_validate(data | changes)


@pytest.fixture(scope="module")
def reference(supernet: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[SplitScores]:
    """The supernet's scores with all visual tokens."""
    job = _job(tmp_path_factory.mktemp("reference"), supernet, budgets=["full"], name="full")
    return run_evaluation(job, Console(file=io.StringIO()), tables=False).summary.splits


def _evaluator(job: EvaluateJob, model: Path, reference: Sequence[SplitScores], **changes: Any) -> WarmEvaluator:
    checkpoint = resolve_checkpoint(str(model))
    models = {str(model): checkpoint, **changes.pop("others", {})}
    return WarmEvaluator(job, models, (reference, 256), **changes)


def test_a_point_has_the_results_of_an_evaluation_of_its_job(
    tmp_path: Path, supernet: Path, reference: Sequence[SplitScores]
) -> None:
    job = _job(tmp_path / "warm", supernet)
    evaluator = _evaluator(job, supernet, reference)
    for number, (grid, budgets) in enumerate([(4, [16]), (0, [16]), (8, [64])]):
        point = {"anchor_grid": grid, "budgets": budgets}
        metrics = evaluator.metrics(point)
        alone = run_evaluation(
            changed(_job(tmp_path / "cold", supernet, name=f"e{number}"), point, "the search"),
            Console(file=io.StringIO()),
            tables=False,
        ).summary
        budget = budgets[0]
        assert metrics["score"] == alone.mean_score(budget).value
        assert {name: metrics[f"score/{name}"] for name in alone.families} == {
            name: alone.mean_score(budget, members).value for name, members in alone.families.items()
        }
        assert (metrics["tokens"], metrics["computed"]) == (budget, NUM_SAMPLES)
        # The predictions have the same keys: a cold evaluation with the store of the warm one computes nothing.
        again = run_evaluation(
            changed(job, point | {"name": f"e{number}"}, "the search"), Console(file=io.StringIO()), tables=False
        )
        assert (again.computed, again.present) == (0, NUM_SAMPLES)
        assert evaluator.metrics(point)["computed"] == 0


def test_points_share_the_model_and_the_features_until_one_changes_them(
    tmp_path: Path, supernet: Path, reference: Sequence[SplitScores], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    encodings: list[int] = []
    monkeypatch.setattr("parcelray.evaluation.passes.worker.load_vlm", _counted(load_vlm, loads))
    monkeypatch.setattr("parcelray.evaluation.predict.predictor.EncoderView", _counted(EncoderView, encodings))
    evaluator = _evaluator(_job(tmp_path, supernet), supernet, reference)
    del loads[:], encodings[:]
    assert "latency_ms" not in evaluator.metrics({"anchor_grid": 4, "budgets": [16]}), (
        "the latency is measured only if it is an objective"
    )
    once = len(encodings)
    evaluator.metrics({"anchor_grid": 2, "budgets": [16]})
    evaluator.metrics({"anchor_grid": None, "budgets": [256], "reducer": None})
    assert (len(loads), len(encodings)) == (1, once)
    evaluator.metrics({"anchor_grid": 4, "budgets": [16], "dtype": "bfloat16"})
    assert len(loads) == 2, "another data type needs another copy of the model"


def test_costs_depend_on_the_point_and_are_averaged_over_budgets(
    tmp_path: Path, supernet: Path, reference: Sequence[SplitScores]
) -> None:
    evaluator = _evaluator(_job(tmp_path, supernet), supernet, reference, measure_latency=True)
    few, many = (
        evaluator.metrics({"anchor_grid": 4, "budgets": [16]}),
        evaluator.metrics({"anchor_grid": 4, "budgets": [64]}),
    )
    without = evaluator.metrics({"anchor_grid": 0, "budgets": [16]})
    assert few["gflops"] < without["gflops"] < many["gflops"], "queries cost more than anchors"
    assert few["kv_cache_bytes"] < many["kv_cache_bytes"]
    assert 0 < few["latency_ms"] < math.inf
    both = evaluator.metrics({"anchor_grid": 4, "budgets": [16, 64]})
    assert both["score"] == pytest.approx((few["score"] + many["score"]) / 2)
    assert (both["score@16"], both["tokens"]) == (few["score"], 40)


def test_an_illegal_point_is_refused_with_the_reason(
    tmp_path: Path, supernet: Path, reference: Sequence[SplitScores]
) -> None:
    evaluator = _evaluator(_job(tmp_path, supernet), supernet, reference)
    with pytest.raises(UserError, match="anchor"):
        evaluator.metrics({"anchor_grid": 8, "budgets": [16]})
    with pytest.raises(ConfigError, match="budgts is not a known key"):
        evaluator.metrics({"budgts": [16]})


def _counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        calls.append(1)
        return function(*args, **more)

    return call


def test_a_point_may_evaluate_another_model(tmp_path: Path, supernet: Path, reference: Sequence[SplitScores]) -> None:
    other = tiny_checkpoint(
        tmp_path / "other", 4, connector={"type": "parcel", "num_heads": 2, "anchor_grids": [0, 1, 2, 4, 8, 16]}
    )
    checkpoint = resolve_checkpoint(str(other))
    evaluator = _evaluator(_job(tmp_path / "warm", supernet), supernet, reference, others={str(other): checkpoint})
    point = evaluator.evaluate({"model.reference": str(other), "budgets": [16]})
    alone = run_evaluation(
        _job(tmp_path / "cold", other, budgets=[16]), Console(file=io.StringIO()), tables=False
    ).summary
    default = evaluator.evaluate({"budgets": [16]})
    texts = [
        [[answer.text for answer in split.answers[16]] for split in splits]
        for splits in (point.splits, alone.splits, default.splits)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_worker_in_another_folder_reads_the_relative_paths_of_the_driver(
    tmp_path: Path, supernet: Path, reference: Sequence[SplitScores], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(supernet, tmp_path / "driver" / "models" / "two" / "model")
    monkeypatch.chdir(tmp_path / "driver")
    data = _job(Path("runs"), supernet).model_dump(mode="json", exclude_unset=True, context=AS_WRITTEN)
    # The storage is left out: its default is relative, too.
    del data["storage"]
    job = EvaluateJob.model_validate(data)
    checkpoint = resolve_checkpoint("models/two/model")
    evaluator = _evaluator(job, supernet, reference, others={str(checkpoint.path): checkpoint})
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "worker")
    worker = replace(evaluator, job=pickle.loads(pickle.dumps(evaluator.job)))
    point = worker.evaluate({"model.reference": "models/two/model", "budgets": [16]})
    assert point.job.storage == f"{tmp_path}/driver/runs"
    assert point.job.model.reference == str(tmp_path / "driver/models/two/model")
    assert (tmp_path / "driver" / "runs" / "predictions").is_dir()
    assert list((tmp_path / "worker").iterdir()) == []


def test_costs_are_within_the_bounds_that_are_known_before_the_search(tmp_path: Path, supernet: Path) -> None:
    evaluator = WarmEvaluator(
        _job(tmp_path, supernet),
        {str(supernet): resolve_checkpoint(str(supernet))},
        ((), 256),
    )
    costs, bounds = evaluator.costs(evaluator.job, 64), evaluator.bounds()
    assert all(bounds[name][0] < value < bounds[name][1] for name, value in costs.items())
    assert bounds["tokens"] == (0.0, 256.0)


def test_a_baseline_is_drawn_at_its_own_costs(tmp_path: Path, supernet: Path, reference: Sequence[SplitScores]) -> None:
    job = _job(tmp_path, supernet, budgets=[16, 64])
    evaluator = _evaluator(job, supernet, reference)
    summary = run_evaluation(
        _job(tmp_path, supernet, budgets=[16, 64], name="baseline"), Console(file=io.StringIO()), tables=False
    ).summary
    for cost in ("gflops", "kv_cache_bytes", "tokens", "latency_ms"):
        search = TuneJob.model_validate(
            {
                "kind": "tune",
                "name": "s",
                "space": {
                    "kind": "search_space",
                    "name": "s",
                    "job": "j",
                    "parameters": {"budgets": {"type": "choice", "values": [[16], [64]]}},
                },
                "base": job.model_dump(),
                "algorithm": {"type": "grid"},
                "objectives": [{"metric": "score", "mode": "max"}, {"metric": cost, "mode": "min"}],
            }
        )
        points = findings_of(search, [], evaluator, {"baseline": Baseline(summary, supernet)}).baselines["baseline"]
        expected = [] if cost == "latency_ms" else [(evaluator.costs(job, budget)[cost], budget) for budget in (16, 64)]
        assert [(point.x, point.num_visual_tokens) for point in points] == expected, (
            "points with an unknown cost are not drawn"
        )
        assert [point.y for point in points] == [summary.mean_score(budget).value for _, budget in expected]
