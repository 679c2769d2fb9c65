"""The study of encoders, from untrained models to one table and one figure."""

import csv
from io import StringIO
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from parcelray.cluster import reduction_methods
from parcelray.cluster.encoder_study import run_encoder_study
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.model import MiniLlavaModelConfig
from parcelray.models.checkpoint import write_manifest
from parcelray.models.mini import save_checkpoint
from parcelray.models.mini_llava import build

from ..models.conftest import CORPUS, MINI_LLAVA


@pytest.mark.slow
def test_encoders_stand_side_by_side_at_equal_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction_methods, "RANDOM_SEEDS", 2)
    models = {}
    for tower in ("clip", "siglip", "convnext"):
        model, processor = build(MiniLlavaModelConfig(**MINI_LLAVA.model_dump() | {"tower": tower}), CORPUS, None, seed=0)
        save_checkpoint(model.eval(), processor, tmp_path / tower)
        write_manifest(tmp_path / tower, config={}, git_commit=None, data=None, seed=0)
        models[tower] = str(tmp_path / tower)
    job = EvaluateJob.model_validate(
        {
            "kind": "evaluate",
            "name": "encoders",
            "benchmarks": [{"name": "mini", "source": {"samples": 2}, "max_new_tokens": 2}],
            "compute": {"actors": 0},
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
            "storage": str(tmp_path / "runs"),
            "max_unscored": 1,
        }
    )
    output = StringIO()
    run_encoder_study(models, job, Console(file=output, width=200), images=2)
    folder = tmp_path / "runs" / "studies" / "encoders"
    with (folder / "encoders.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    reduced = {(row["encoder"], row["method"], int(row["num_visual_tokens"])) for row in rows if row["method"] != "full"}
    methods = ("cluster", "average pooling", "spatial", "DivPrune", "random")
    assert reduced == {(tower, method, budget) for tower in models for method in methods for budget in (16, 25, 49, 81)}
    assert sum(row["method"] == "full" for row in rows) == 3
    for name in ("encoders.png", "redundancy.png", "redundancy.json", "confounded.txt"):
        assert (folder / name).stat().st_size > 0
    assert "What differs besides the encoder" in output.getvalue()
    client = MlflowClient(job.tracking.uri)
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    (joined,) = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == "study-encoders"]
    assert "encoders.csv" in {file.path for file in client.list_artifacts(joined.info.run_id)}
