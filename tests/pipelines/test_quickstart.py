"""The quickstart as its user runs it, with fewer steps and samples."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from parcelray.config.loader import load_job_of
from parcelray.config.train import TrainJob
from parcelray.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"vanilla", "parcel", "m3", "mqt"}


def _command(folder: Path) -> list[str]:
    changes = (
        f"storage={folder}",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        "training.steps=2",
        "training.images_per_step=8",
        # Ray Train's processes take far longer to start than two steps; what they do is tested where training is.
        "scaling.num_workers=0",
        "validation.samples=1",
        "report.samples=3",
    )
    return [sys.executable, "pipelines/quickstart.py", *(part for change in changes for part in ("--set", change))]


def _quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(folder), cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)


def _interrupted_after_the_first_training(folder: Path) -> None:
    driver = subprocess.Popen(_command(folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(folder.glob("train/*/result.json")) and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert not list(folder.glob("quickstart/*.done"))


def _weights(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("train/*/model/model.safetensors")}


@pytest.mark.ray
@pytest.mark.slow
def test_the_quickstart_goes_on_compares_registers_answers_and_is_then_done(tmp_path: Path) -> None:
    _interrupted_after_the_first_training(tmp_path)
    trained = _weights(tmp_path)
    assert len(trained) == 1
    first = _quickstart(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "quickstart-vanilla" in first.stdout
    assert trained.items() <= _weights(tmp_path).items()
    frontier = json.loads((tmp_path / "quickstart" / "frontier.json").read_text(encoding="utf-8"))
    assert frontier["reference"] == "vanilla"
    points = {(point["method"], point["num_visual_tokens"]) for point in frontier["points"]}
    assert points == {("majority", 0), ("blind", 0), ("vanilla", 256)} | {(method, budget) for method in METHODS - {"vanilla"} for budget in (16, 64, 256)}
    assert (tmp_path / "quickstart" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    for budget in (16, 64, 256):
        assert f"{budget:>3} visual tokens: " in first.stdout

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    version = client.get_model_version_by_alias("parcelray-mini", "champion")
    assert version.run_id is not None
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    # The pipeline, its trainings, and the evaluation of each below it.
    parents = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in runs}
    (pipeline,) = (run for run, parent in parents.items() if parent is None)
    trainings = [run for run, parent in parents.items() if parent == pipeline]
    assert len(trainings) == len(METHODS)
    assert sorted(parent for parent in parents.values() if parent not in (None, pipeline)) == sorted(trainings)

    models = _weights(tmp_path)
    assert len(models) == len(METHODS)
    second = _quickstart(tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "nothing to compute" in second.stdout
    assert _weights(tmp_path) == models


def test_an_argument_that_the_quickstart_does_not_know_is_refused(tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "pipelines/quickstart.py", "--steps", "3"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 2
    assert "--set a.b=c" in found.stdout


def test_a_searched_routing_is_trained_under_a_name_of_its_own_beside_the_shipped_run(tmp_path: Path) -> None:
    quickstart = runpy.run_path(str(ROOT / "pipelines" / "quickstart.py"))
    place = f"storage={tmp_path}"
    routing = "connector.routing=[{min_budget: 16, max_budget: 256, anchor_grid: 2}]"
    shipped, routed = (load_job_of(TrainJob, quickstart["JOB"], changes) for changes in ([place], [place, routing]))
    before, after = (quickstart["named_jobs"](job, load_job_of(TrainJob, quickstart["JOB"])) for job in (shipped, routed))
    for job in (*before.values(), *after.values()):
        RunFolder(job).claim()
    assert {job.name for job in before.values()} == {f"quickstart-{method}" for method in METHODS}
    assert [method for method in METHODS if before[method] != after[method]] == ["parcel"], "the rivals are used again"
    assert after["parcel"].name.startswith("quickstart-parcel-")
