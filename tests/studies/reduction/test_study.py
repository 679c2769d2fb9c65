"""Studies of training-free methods and of attention, from a checkpoint to tables, pictures and MLflow, in this process."""

import csv
import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.reducer import (
    AveragePoolingConfig,
    ClusterAggregateConfig,
    FastVConfig,
    PyramidDropConfig,
    SaliencyConfig,
    ToMeConfig,
)
from parcelray.config.train import TrackingConfig
from parcelray.errors import UserError
from parcelray.models.backbones.base import Depths
from parcelray.models.checkpoint import write_manifest
from parcelray.models.mini import save_checkpoint
from parcelray.models.mini_llava import build
from parcelray.studies.attention import study_redundancy, study_saliency, study_validity
from parcelray.studies.reduction import methods as reduction_methods
from parcelray.studies.reduction.methods import all_budgets, budgets_of, groups_of, methods_of
from parcelray.studies.reduction.study import run_reduction_study

from ...models.conftest import CORPUS, MINI_LLAVA
from ...stores import new_store

pytestmark = pytest.mark.usefixtures("without_pictures")
CHOSEN = ["cluster", "RESTORE", "FastV", "cluster, contiguous"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mini LLaVA with random weights."""
    folder = tmp_path_factory.mktemp("llava") / "model"
    model, processor = build(MINI_LLAVA, CORPUS, None, seed=0)
    save_checkpoint(model.eval(), processor, folder)
    write_manifest(folder, config={}, git_commit=None, data=None, seed=0)
    return folder


@pytest.mark.slow
def test_the_study_compares_methods_with_random_and_records_them(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction_methods, "RANDOM_SEEDS", 2)
    job = EvaluateJob.model_validate(
        {
            "kind": "evaluate",
            "name": "study",
            "model": {"reference": str(checkpoint)},
            "benchmarks": [{"name": "mini", "source": {"samples": 2}, "max_new_tokens": 2}],
            "budgets": ["full"],
            "compute": {"actors": 0},
            "tracking": {"uri": new_store(tmp_path)},
            "storage": str(tmp_path / "runs"),
            "max_unscored": 1,
        }
    )
    study = run_reduction_study(job, Console(file=StringIO(), width=200), methods=CHOSEN, shares=(0.05, 0.3))
    points = {(point.method, point.num_visual_tokens): point for point in study.frontier.points}
    assert ("blind", 0) in points
    whole = points["full", 256].gflops
    assert whole is not None
    for name in CHOSEN:
        budgets = [budget for method, budget in points if method == name]
        assert len(budgets) == 2
        # Fewer tokens, less compute, and less than the full model (the pooling of everything costs what it costs).
        flops = [points[name, budget].gflops or 0 for budget in sorted(budgets)]
        assert flops == sorted(flops)
        assert flops[-1] < whole
    # Every method has both comparisons at every one of its budgets, and spatial sampling the one with random.
    asked = {(name, budget) for name, budget in points if name in CHOSEN}
    spatial = {(name, budget) for name, budget in points if name.startswith("spatial")}
    assert len(spatial) == 4 + 2
    assert {(each.method, each.num_visual_tokens) for each in study.against_random} == asked | spatial
    assert {(each.method, each.num_visual_tokens) for each in study.against_spatial} == asked
    assert all(0 < each.p_value <= each.p_holm <= 1 for each in study.against_random)
    assert all(each.spread is not None for each in study.against_random)
    assert {each.subject for each in study.breakpoints} <= {
        "general",
        "resolution",
        "grounding",
        "video",
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
    # The reference, four methods, spatial sampling and two seeds of random sampling with each kind of positions.
    assert sum(run.data.tags.get("mlflow.parentRunId") == parent.info.run_id for run in runs) == 11
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert "cluster/score" in parent.data.metrics
    assert "against_random.csv" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_an_unknown_method_is_named_with_the_known_ones(checkpoint: Path, tmp_path: Path) -> None:
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


def test_every_method_has_a_panel_and_budgets_of_a_small_and_a_large_model() -> None:
    for num_tokens, depths in ((256, SMALL), (576, LARGE)):
        methods = methods_of(depths)
        assert sorted(name for names in groups_of(methods).values() for name in names) == sorted(methods)
        assert all(1 <= len(budgets_of([method.reducer], num_tokens, depths)) <= 4 for method in methods.values())
    assert budgets_of([ClusterAggregateConfig()], 576, LARGE) == (29, 63, 115, 173)
    assert budgets_of([AveragePoolingConfig()], 576, LARGE) == (25, 64, 121, 169)
    assert budgets_of([ToMeConfig()], 256, SMALL) == (32, 51, 77)
    assert budgets_of([FastVConfig(layer=1)], 256, SMALL) == (86, 128, 171, 213)
    assert budgets_of([ClusterAggregateConfig(), AveragePoolingConfig()], 256, SMALL) == (16, 25, 49, 81)


def test_layers_are_the_published_ones_of_llava_and_scale_with_the_depth() -> None:
    large, small = methods_of(LARGE), methods_of(SMALL)
    assert large["FastV"].reducer == FastVConfig(layer=2)
    assert large["last word"].reducer == SaliencyConfig(positions="original", definition="last_text", layer=2)
    assert large["PyramidDrop"].reducer == PyramidDropConfig(positions="original")
    assert budgets_of([large["PyramidDrop, early"].reducer], 576, LARGE) == (37, 63, 115, 173)
    assert small["FastV"].reducer == FastVConfig(layer=1)
    assert "PyramidDrop, early" not in small
    assert "VisionZip" not in methods_of(Depths(0, 3)), "a convolutional tower has no attention"


def test_every_method_meets_its_baselines_at_all_its_budgets() -> None:
    methods = methods_of(SMALL)
    budgets = all_budgets(methods, 256, SMALL, equal=False)
    assert budgets["spatial"] == (13, 16, 25, 28, 32, 49, 51, 77, 81, 86, 128, 171, 213)
    assert budgets["spatial, contiguous"] == (13, 28, 51, 77)
    chosen = {name: methods[name] for name in ("cluster", "average pooling", "spatial")}
    assert set(all_budgets(chosen, 256, SMALL, equal=True).values()) == {(16, 25, 49, 81)}


def test_attention_and_redundancy_are_studied_and_recorded(checkpoint: Path, tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=new_store(tmp_path))
    output = StringIO()
    console = Console(file=output, width=200)
    saliency = study_saliency(str(checkpoint), console, count=2, folder=tmp_path / "saliency", tracking=tracking)
    validity = study_validity(
        str(checkpoint), console, count=2, permutations=100, folder=tmp_path / "validity", tracking=tracking
    )
    redundancy = study_redundancy(
        [str(checkpoint)], console, count=2, folder=tmp_path / "redundancy", tracking=tracking
    )
    for name in (
        "saliency/agreement.png",
        "saliency/heat_maps_1.png",
        "validity/validity.png",
        "redundancy/redundancy.png",
    ):
        with Image.open(tmp_path / name) as image:
            assert image.width > 300
    written = {
        name: json.loads((tmp_path / name / f"{name}.json").read_text())
        for name in ("saliency", "validity", "redundancy")
    }
    assert written["saliency"]["last word"] == saliency["last word"].to_dict()
    assert written["validity"]["pairs"] == 2
    assert written["validity"]["measures"] == {name: each.to_dict() for name, each in validity.items()}
    assert {"random", "norm", "vision tower", "last word, layer 0"} <= validity.keys()
    assert written["redundancy"] == {str(checkpoint): redundancy[str(checkpoint)].to_dict()}
    assert "pairs of" in output.getvalue()
    client = MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    recorded = {run.info.run_name: run.data.metrics for run in client.search_runs([experiment.experiment_id])}
    assert recorded.keys() == {f"analyze-{name}-{name}" for name in written}
    assert recorded["analyze-validity-validity"]["norm/correlation"] == pytest.approx(
        validity["norm"].correlation.value
    )


def test_a_users_own_images_need_prompts_and_must_be_there(checkpoint: Path, tmp_path: Path) -> None:
    for number in range(2):
        Image.fromarray(np.full((40, 50, 3), 100 * number, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    console, tracking = Console(quiet=True), TrackingConfig(uri=None)
    prompts = ["what is this", "how many"]
    with pytest.raises(UserError, match="0 prompts were given with the images of"):
        study_saliency(
            str(checkpoint), console, images=str(tmp_path), count=2, folder=tmp_path / "out", tracking=tracking
        )
    with pytest.raises(UserError, match="holds 2 images, fewer than the 9"):
        study_saliency(
            str(checkpoint),
            console,
            images=str(tmp_path),
            count=9,
            prompts=prompts,
            folder=tmp_path / "out",
            tracking=tracking,
        )
    report = study_saliency(
        str(checkpoint),
        console,
        images=str(tmp_path),
        count=2,
        prompts=prompts,
        folder=tmp_path / "out",
        tracking=tracking,
    )
    assert len(report["last word"].between_prompts) == 3
