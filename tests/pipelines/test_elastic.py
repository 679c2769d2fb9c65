"""The stages of the elastic study with a few steps and samples."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of
from parcelray.config.train import TrainJob
from parcelray.models.manifest import verify_manifest
from parcelray.studies.elastic import choice
from parcelray.studies.elastic.choice import outcomes, train_choices
from parcelray.studies.elastic.runs import SYSTEMS, runs_of
from parcelray.studies.elastic.ship import SHIPPED, ship

from .scripts import script, sets

SMALL = ("tracking.uri=null", "training.images_per_step=8", "validation.samples=1")


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_systems_are_trained_evaluated_reported_and_shipped(tmp_path: Path) -> None:
    pipeline, output = script("elastic"), io.StringIO()
    own = [f"storage={tmp_path}", *SMALL]
    # With enough questions the vanilla model scores above 0 in some family, so that there is a retention.
    theirs = [
        "tracking.uri=null",
        "benchmarks=[{name: mini, source: {samples: 6}}]",
        "budgets=[blind, 16, 48, 64, 256]",
    ]
    arguments = ["--seeds", "4", "--steps", "1", *sets(*own, *(f"evaluation.{each}" for each in theirs))]
    for stage in ("train", "train", "evaluate", "report"):
        pipeline.run([stage, *arguments], Console(file=output, width=200))
    assert output.getvalue().count("is finished; nothing to do") == len(SYSTEMS)
    assert {path.name for path in (tmp_path / "elastic").glob("*.md")} == {
        f"{name}-1.md" for name in ("scores", "retention", "families", "differences", "targets")
    }
    assert "| PARCEL: at least 85 % retention at 64 | " in (tmp_path / "elastic" / "targets-1.md").read_text()
    job = load_job_of(TrainJob, pipeline.JOBS / "train" / "elastic.yaml", own)
    evaluation = load_job_of(EvaluateJob, pipeline.JOBS / "evaluate" / "elastic.yaml", theirs)
    folders = ship(runs_of(list(SYSTEMS), [4], 1), job, evaluation, tmp_path / "assets", Console(file=output))
    assert {folder.name for folder in folders} == set(SHIPPED.values())
    for folder in folders:
        verify_manifest(folder)
        assert "| blind (no image) |" in (folder / "README.md").read_text()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_variants_are_trained_once_and_ranked_by_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = (("local", "stratified", "no"), ("local", "stratified", "yes"))
    everything = choice.variants()
    monkeypatch.setattr(choice, "variants", lambda: {key: everything[key] for key in chosen})
    job = load_job_of(TrainJob, script("elastic").JOBS / "train" / "elastic.yaml", [f"storage={tmp_path}", *SMALL])
    for _ in range(2):
        train_choices(job, Console(file=io.StringIO()), steps=3, samples=1)
    found = outcomes(job, steps=3)
    assert {each.distillation: each.steps for each in found} == {"no": 3, "yes": 1}
    assert found[0].mean_loss <= found[1].mean_loss
    assert all(set(each.losses) == set(each.scores) == set(choice.BUDGETS) for each in found)
