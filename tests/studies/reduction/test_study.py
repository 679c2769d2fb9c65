"""The study of training-free reduction, from a checkpoint to tables, pictures and MLflow, in this process."""

import csv
import json
from io import StringIO
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from parcelray.benchmarks.catalog import catalog, find
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.reducer import (
    AveragePoolingConfig,
    ClusterAggregateConfig,
    FastVConfig,
    PyramidDropConfig,
    SaliencyConfig,
    ToMeConfig,
)
from parcelray.errors import UserError
from parcelray.models.backbones.base import Depths
from parcelray.studies.reduction import methods as reduction_methods
from parcelray.studies.reduction.methods import all_budgets, budgets_of, groups_of, methods_of
from parcelray.studies.reduction.study import run_reduction_study

from ...benchmarks.table_data import write_benchmark
from ...stores import new_store

pytestmark = pytest.mark.usefixtures("without_pictures")
CHOSEN = ["cluster", "RESTORE", "FastV", "cluster, contiguous"]


@pytest.mark.slow
def test_the_study_compares_methods_with_their_baselines_and_records_them(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction_methods, "RANDOM_SEEDS", 2)
    tables = ("gqa", "textvqa_val")
    for name in tables:
        write_benchmark(find(name, catalog()), tmp_path / name)
    job = EvaluateJob.model_validate(
        {
            "kind": "evaluate",
            "name": "study",
            "model": {"reference": str(checkpoint)},
            "benchmarks": [
                {"name": "mini", "source": {"samples": 2}, "max_new_tokens": 2},
                *({"name": name, "data": str(tmp_path / name), "max_new_tokens": 2} for name in tables),
            ],
            "budgets": ["full"],
            "compute": {"actors": 0},
            "tracking": {"uri": new_store(tmp_path)},
            "storage": str(tmp_path / "runs"),
            "max_unscored": 1,
        }
    )
    study = run_reduction_study(job, Console(file=StringIO(), width=200), methods=CHOSEN, shares=(0.11, 0.3))
    points = {(point.method, point.num_visual_tokens): point for point in study.frontier.points}
    assert ("blind", 0) in points
    whole = points["full", 256].gflops
    assert whole is not None
    for name in CHOSEN:
        budgets = [budget for method, budget in points if method == name]
        assert len(budgets) == 2
        # Compute increases with the tokens, and is less than that of the full model.
        flops = [points[name, budget].gflops or 0 for budget in sorted(budgets)]
        assert flops == sorted(flops)
        assert flops[-1] < whole
    # Every method is compared with both baselines at each of its budgets, and spatial sampling with random sampling.
    tested = {(name, budget) for name, budget in points if name in CHOSEN}
    spatial = {(name, budget) for name, budget in points if name.startswith("spatial")}
    assert len(spatial) == 4 + 2
    assert {(each.method, each.num_visual_tokens) for each in study.against_random} == tested | spatial
    assert {(each.method, each.num_visual_tokens) for each in study.against_spatial} == tested
    assert all(0 < each.p_value <= each.p_holm <= 1 for each in study.against_random)
    assert all(each.spread is not None for each in study.against_random)
    assert {each.subject for each in study.breakpoints} <= {
        "general",
        "resolution",
        "grounding",
        "video",
        *tables,
        "text",
        "documents",
        "charts",
        "spatial",
    }
    assert study.operating[-1].overall.value == max(
        point.overall.value for point in points.values() if point.gflops is not None
    )
    written = json.loads((study.folder / "frontier.json").read_text())["points"]
    scores = {(point["method"], point["num_visual_tokens"]): point["overall"]["value"] for point in written}
    assert scores == {name: pytest.approx(point.overall.value) for name, point in points.items()}
    for name, comparisons in (
        ("against_random", study.against_random),
        ("against_spatial", study.against_spatial),
        ("against_best", study.against_best),
    ):
        rows = _csv(study.folder / f"{name}.csv")
        assert [(row["method"], int(row["num_visual_tokens"])) for row in rows] == [
            (each.method, each.num_visual_tokens) for each in comparisons
        ]
        assert [float(row["p_value"]) for row in rows] == pytest.approx(
            [each.p_value for each in comparisons], abs=1e-3
        )
    table = (study.folder / "frontier.md").read_text()
    # 11 % of 256 tokens are 28 tokens.
    assert "| cluster | 28 |" in table
    assert "| blind | - |" in table
    assert "textvqa_val" in table
    operating = [(row["method"], int(row["num_visual_tokens"])) for row in _csv(study.folder / "operating_points.csv")]
    assert operating == [(point.method, point.num_visual_tokens) for point in study.operating]
    for name in ("accuracy_against_compute.png", "frontier.png"):
        with Image.open(study.folder / name) as image:
            assert image.width > 300
    client = MlflowClient(job.tracking.uri)
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if run.info.run_name == "study-study")
    # The reference, four methods, and for both token placements spatial sampling and two seeds of random sampling.
    assert sum(run.data.tags.get("mlflow.parentRunId") == parent.info.run_id for run in runs) == 11
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert "cluster/score" in parent.data.metrics
    assert "against_random.csv" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_an_unknown_method_is_refused_with_the_known_ones(checkpoint: Path, tmp_path: Path) -> None:
    job = EvaluateJob.model_validate(
        {
            "kind": "evaluate",
            "name": "study",
            "model": {"reference": str(checkpoint)},
            "benchmarks": ["mini"],
            "tracking": {"uri": None},
        }
    )
    with pytest.raises(
        UserError, match="clusters is not a training-free method of this model; choose from cluster, cluster, cosine"
    ):
        run_reduction_study(job, Console(quiet=True), methods=["clusters"])


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


SMALL, LARGE = Depths(3, 3), Depths(23, 32)


def test_every_method_has_a_panel_and_budgets_for_small_and_large_models() -> None:
    for num_tokens, depths in ((256, SMALL), (576, LARGE)):
        methods = methods_of(depths)
        assert sorted(name for names in groups_of(methods).values() for name in names) == sorted(methods)
        assert all(1 <= len(budgets_of([method.reducer], num_tokens, depths)) <= 4 for method in methods.values())
    assert budgets_of([ClusterAggregateConfig()], 576, LARGE) == (29, 63, 115, 173)
    assert budgets_of([AveragePoolingConfig()], 576, LARGE) == (25, 64, 121, 169)
    assert budgets_of([ToMeConfig()], 256, SMALL) == (32, 51, 77)
    assert budgets_of([FastVConfig(layer=1)], 256, SMALL) == (86, 128, 171, 213)
    assert budgets_of([ClusterAggregateConfig(), AveragePoolingConfig()], 256, SMALL) == (16, 25, 49, 81)


def test_layers_are_the_published_ones_for_llava_and_scale_with_the_depth() -> None:
    large, small = methods_of(LARGE), methods_of(SMALL)
    assert large["FastV"].reducer == FastVConfig(layer=2)
    assert large["last word"].reducer == SaliencyConfig(positions="image", definition="last_text", layer=2)
    assert large["PyramidDrop"].reducer == PyramidDropConfig(positions="image")
    assert budgets_of([large["PyramidDrop, early"].reducer], 576, LARGE) == (37, 63, 115, 173)
    assert small["FastV"].reducer == FastVConfig(layer=1)
    assert "PyramidDrop, early" not in small
    assert "VisionZip" not in methods_of(Depths(0, 3)), "a convolutional tower has no attention"


def test_the_baselines_have_all_budgets_of_the_methods() -> None:
    methods = methods_of(SMALL)
    budgets = all_budgets(methods, 256, SMALL, equal=False)
    assert budgets["spatial"] == (13, 16, 25, 28, 32, 49, 51, 77, 81, 86, 128, 171, 213)
    assert budgets["spatial, contiguous"] == (13, 28, 51, 77)
    chosen = {name: methods[name] for name in ("cluster", "average pooling", "spatial")}
    assert set(all_budgets(chosen, 256, SMALL, equal=True).values()) == {(16, 25, 49, 81)}
