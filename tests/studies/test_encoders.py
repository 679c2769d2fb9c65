"""The study of vision encoders, from untrained models to one table and one figure."""

import csv
import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.model import MiniLlavaModelConfig
from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.models.manifest import write_manifest
from parcelray.models.mini import save_checkpoint
from parcelray.models.mini_llava import build
from parcelray.studies import encoders as encoder_study
from parcelray.studies.encoders import METHODS, run_encoder_study
from parcelray.studies.reduction import methods as reduction_methods
from parcelray.studies.reduction.results import ReductionStudy

from ..models.conftest import CORPUS, MINI_LLAVA
from ..stores import new_store

BUDGETS = (16, 25, 49, 81)


def _models(folder: Path, *towers: str) -> dict[str, str]:
    models = {}
    for tower in towers:
        model, processor = build(
            MiniLlavaModelConfig(**MINI_LLAVA.model_dump() | {"tower": tower}), CORPUS, None, seed=0
        )
        save_checkpoint(model.eval(), processor, folder / tower)
        write_manifest(folder / tower, config={}, git_commit=None, data=None, seed=0)
        models[tower] = str(folder / tower)
    return models


def _job(folder: Path) -> EvaluateJob:
    return EvaluateJob.model_validate(
        {
            "kind": "evaluate",
            "name": "encoders",
            "benchmarks": [{"name": "mini", "source": {"samples": 2}, "max_new_tokens": 2}],
            "compute": {"actors": 0},
            "tracking": {"uri": new_store(folder)},
            "storage": str(folder / "runs"),
            "max_unscored": 1,
        }
    )


def _rows(job: EvaluateJob) -> list[dict[str, str]]:
    with (Path(job.storage) / "studies" / "encoders" / "encoders.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _joined_run(job: EvaluateJob) -> Any:
    client = MlflowClient(job.tracking.uri)
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    (joined,) = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == "study-encoders"]
    assert {file.path for file in client.list_artifacts(joined.info.run_id)} >= {
        "encoders.csv",
        "confounded.txt",
        "figures",
    }
    return joined


def test_the_results_of_all_encoders_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduction studies are made up, so that the numbers are known; the redundancy is measured."""
    calls: list[tuple[EvaluateJob, dict[str, Any]]] = []

    def study(job: EvaluateJob, console: Console, **options: Any) -> ReductionStudy:
        calls.append((job, options))

        def point(method: str, budget: int, score: float, kept: float | None) -> FrontierPoint:
            retention = None if kept is None else Interval(kept, kept - 1, kept + 2, 9)
            return FrontierPoint(method, budget, Interval(score, score - 3, score + 4, 9), retention, {}, 0)

        score = 40.0 if "clip" in job.name else 20.0
        points = [point("blind", 0, 5.0, None), point("full", 256, score, 100.0)]
        points += [
            point(name, budget, score * budget / 256, 100 * budget / 256)
            for name in ("cluster", "random")
            for budget in (16, 64)
        ]
        return cast(ReductionStudy, SimpleNamespace(frontier=Frontier(tuple(points), reference="full")))

    monkeypatch.setattr(encoder_study, "run_reduction_study", study)
    models, job, output = _models(tmp_path, "clip", "convnext"), _job(tmp_path), StringIO()
    run_encoder_study(models, job, Console(file=output, width=200), images=2)
    assert [(each.name, each.model.reference) for each, _ in calls] == [
        (f"encoders-{tower}", models[tower]) for tower in models
    ]
    assert [options for _, options in calls] == [{"methods": METHODS, "equal_budgets": True}] * 2, (
        "encoders are compared at equal budgets"
    )
    rows = {(row["encoder"], row["method"], int(row["num_visual_tokens"])): row for row in _rows(job)}
    known = [("full", 256), *((method, budget) for method in ("cluster", "random") for budget in (16, 64))]
    assert set(rows) == {(tower, *each) for tower in models for each in known}, "the blind model has no retention"
    assert (rows["clip", "full", 256]["score"], rows["convnext", "full", 256]["score"]) == ("40.0", "20.0")
    row = rows["convnext", "cluster", 64]
    assert [float(row[name]) for name in ("score", "score_low", "score_high")] == [5, 2, 9]
    assert [float(row[name]) for name in ("retention", "retention_low", "retention_high")] == [25, 24, 27]
    assert "25.0 [24.0, 27.0]" in output.getvalue()
    assert "The encoder is not the only difference" in output.getvalue()
    joined = _joined_run(job)
    assert joined.data.metrics["convnext/cluster/retention"] == 25, "MLflow shows the value at the largest budget"
    folder = Path(job.storage) / "studies" / "encoders"
    profiles = json.loads((folder / "redundancy.json").read_text())
    for name, reference in models.items():
        measured = profiles[reference]["patch features: mean cosine of pairs"]["value"]
        assert joined.data.metrics[f"{name}/patch_features__mean_cosine_of_pairs"] == measured
    with Image.open(folder / "encoders.png") as image:
        assert image.width > 300


@pytest.mark.nightly
@pytest.mark.slow
def test_encoders_are_compared_at_equal_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs real studies of the encoders that reduction/test_study.py does not use, one of which has no attention."""
    monkeypatch.setattr(reduction_methods, "RANDOM_SEEDS", 2)
    models, job, output = _models(tmp_path, "siglip", "convnext"), _job(tmp_path), StringIO()
    run_encoder_study(models, job, Console(file=output, width=200), images=2)
    rows = _rows(job)
    reduced = {
        (row["encoder"], row["method"], int(row["num_visual_tokens"])) for row in rows if row["method"] != "full"
    }
    methods = (*METHODS, "random")
    assert reduced == {(tower, method, budget) for tower in models for method in methods for budget in BUDGETS}
    assert sum(row["method"] == "full" for row in rows) == 2
    assert {"encoders.png", "redundancy.png", "redundancy.json", "confounded.txt"} <= {
        path.name for path in (Path(job.storage) / "studies" / "encoders").iterdir()
    }
    _joined_run(job)
