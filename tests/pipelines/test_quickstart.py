"""The quickstart with fewer steps and samples: in this process, and as a script on Ray that is killed and restarted."""

import io
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from parcelray.config.train import ReportConfig
from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.tracking.run_folder import RunFolder
from parcelray.training import compare
from parcelray.training.compare import ranking

from ..stores import new_store
from .scripts import kill_script, run_script, script, sets

METHODS = {"vanilla", "parcel", "m3", "mqt"}


def _changes(folder: Path, *more: str) -> list[str]:
    return [
        f"storage={folder}",
        f"tracking.uri={new_store(folder)}",
        "training.steps=2",
        "training.images_per_step=8",
        "validation.samples=1",
        "report={samples: 3, budgets: [16, 32, 64, 256]}",
        *more,
    ]


def _weights(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("train/*/model/model.safetensors")}


def _check_results(folder: Path) -> None:
    frontier = json.loads((folder / "quickstart-base" / "frontier.json").read_text(encoding="utf-8"))
    assert frontier["reference"] == "vanilla"
    points = {(point["method"], point["num_visual_tokens"]) for point in frontier["points"]}
    assert points == {("majority", 0), ("blind", 0), ("vanilla", 256), ("m3", 16), ("m3", 64), ("m3", 256)} | {
        (method, budget) for method in ("parcel", "mqt") for budget in (16, 32, 64, 256)
    }
    assert (folder / "quickstart-base" / "frontier.png").read_bytes().startswith(b"\x89PNG")

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    version = client.get_model_version_by_alias("parcelray-mini", "champion")
    assert version.run_id is not None
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    # The runs are the pipeline, its trainings, and an evaluation nested under each training.
    parents = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in runs}
    (pipeline,) = (run for run, parent in parents.items() if parent is None)
    trainings = [run for run, parent in parents.items() if parent == pipeline]
    assert len(trainings) == len(METHODS)
    assert sorted(parent for parent in parents.values() if parent not in (None, pipeline)) == sorted(trainings)
    assert len(_weights(folder)) == len(METHODS)


def _in_this_process(tasks: Mapping[str, Callable[[], Any]], *, at_once: int) -> Iterator[tuple[str, Any]]:
    """Replaces Ray's workers; the functions are sent to them in this form."""
    for name, task in tasks.items():
        yield name, pickle.loads(pickle.dumps(task))()


@pytest.mark.slow
def test_the_quickstart_compares_and_registers_models_and_a_second_run_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickstart = script("quickstart")
    monkeypatch.setattr(quickstart, "ray_session", nullcontext)
    monkeypatch.setattr(compare, "run_in_workers", _in_this_process)
    job = quickstart.job_of(_changes(tmp_path, "training.steps=1"), from_base=True)
    output = io.StringIO()
    quickstart.run(job, Console(file=output, width=200), from_base=True)
    _check_results(tmp_path)
    assert "by the rule: the highest mean, over the offered budgets" in output.getvalue()
    assert re.search(r"^  256 visual tokens: ", output.getvalue(), flags=re.MULTILINE)
    models = _weights(tmp_path)
    again = io.StringIO()
    quickstart.run(job, Console(file=again, width=200), from_base=True)
    assert "nothing to compute" in again.getvalue()
    assert "Registered: models:/parcelray-mini/1" in again.getvalue()
    assert _weights(tmp_path) == models


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_quickstart_is_resumed_and_a_further_run_does_nothing(tmp_path: Path) -> None:
    command = ("quickstart", "--from-base", *sets(*_changes(tmp_path)))
    kill_script(*command, log=tmp_path / "killed.log", when=lambda: bool(list(tmp_path.glob("train/*/result.json"))))
    assert not list(tmp_path.glob("quickstart-base/*.done"))
    trained = _weights(tmp_path)
    assert trained
    first = run_script(*command)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "was finished; evaluated" in first.stdout
    assert trained.items() <= _weights(tmp_path).items()
    _check_results(tmp_path)
    models = _weights(tmp_path)
    second = run_script(*command)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "nothing to compute" in second.stdout
    assert _weights(tmp_path) == models


def test_an_unknown_argument_of_the_quickstart_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipelines/quickstart.py", "--steps", "3"])
    assert script("quickstart").main() == 2
    assert "--set a.b=c" in capsys.readouterr().out


def test_all_methods_are_tuned_alike_from_their_shipped_models() -> None:
    quickstart = script("quickstart")
    jobs = quickstart.named_jobs(quickstart.job_of([], from_base=False), from_base=False)
    assert set(jobs) == METHODS
    for method, job in jobs.items():
        assert (job.name, job.model.reference, job.connector) == (f"quickstart-{method}", f"mini_{method}", None)
    own = {"name", "model", "connector", "budget", "validation"}
    assert all(job.model_dump(exclude=own) == jobs["parcel"].model_dump(exclude=own) for job in jobs.values())
    base = quickstart.named_jobs(quickstart.job_of([], from_base=True), from_base=True)
    assert {job.model.reference for job in base.values()} == {"mini_base"}


def test_a_searched_routing_is_trained_under_another_name_than_the_shipped_one(tmp_path: Path) -> None:
    quickstart = script("quickstart")
    storage = f"storage={tmp_path}"
    routing = "connector.routing=[{min_budget: 16, max_budget: 256, anchor_grid: 2}]"
    before, after = (
        quickstart.named_jobs(quickstart.job_of(changes, from_base=True), from_base=True)
        for changes in ([storage], [storage, routing])
    )
    for job in (*before.values(), *after.values()):
        RunFolder(job).claim()
    assert {job.name for job in before.values()} == {f"quickstart-base-{method}" for method in METHODS}
    assert [method for method in METHODS if before[method] != after[method]] == ["parcel"], "the baselines are reused"
    assert after["parcel"].name.startswith("quickstart-base-parcel-")


def _point(method: str, budget: int, score: float) -> FrontierPoint:
    return FrontierPoint(method, budget, Interval(score, score, score, 9), None, {}, 0)


def test_the_winner_has_the_best_mean_of_what_it_offers_within_each_budget() -> None:
    points = [
        _point("majority", 0, 90),
        _point("vanilla", 256, 50),
        *(_point("m3", budget, score) for budget, score in ((16, 20), (64, 30), (256, 50))),
        # The drop at 64 does not count: a request for 64 tokens can be answered with 32.
        *(_point("parcel", budget, score) for budget, score in ((16, 20), (32, 40), (64, 30), (256, 45))),
    ]
    ranked = ranking(Frontier(tuple(points), "vanilla"), ReportConfig(budgets=(16, 32, 64, 256)))
    assert ranked == [("parcel", (20 + 40 + 40 + 45) / 4), ("m3", (20 + 20 + 30 + 50) / 4), ("vanilla", 50 / 4)]
