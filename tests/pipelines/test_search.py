"""`make search` as its user runs it, with fewer steps, points and samples, and its driver killed in the middle."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from parcelray.models.checkpoint import verify_manifest
from parcelray.tuning.trial_record import TrialRecord

ROOT = Path(__file__).resolve().parents[2]


def _command(folder: Path) -> list[str]:
    # Few processes: nearly all of the time is theirs to start.
    changes = (
        f"storage={folder}",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        "scaling.num_workers=0",
        "training.steps=2",
        "training.images_per_step=8",
        "validation.samples=1",
        "splits.space.parameters.anchor_grid={type: choice, values: [0, 2, 4]}",
        "splits.space.parameters.budgets={type: choice, values: [[16], [64]]}",
        "splits.adaptive.budgets=[16, 64]",
        "splits.base.benchmarks=[{name: mini, source: {split: validation, samples: 4}}]",
        "splits.base.compute.actors=0",
        "clusters.base.benchmarks=[{name: mini, source: {split: validation, samples: 4}}]",
        "clusters.base.compute.actors=0",
        "clusters.algorithm={type: optuna, trials: 3, startup_trials: 2, batch: 2}",
    )
    return [sys.executable, "pipelines/search.py", *(part for change in changes for part in ("--set", change))]


def _killed_during_the_split_search(folder: Path) -> set[str]:
    """Returns the keys of the trials that were finished."""
    driver = subprocess.Popen(_command(folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    search = folder / "tune" / "anchor_query_split"
    deadline = time.monotonic() + 400
    while not TrialRecord(search).trials and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    return {trial.key for trial in TrialRecord(search).trials}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_search_goes_on_and_leaves_frontiers_in_mlflow(tmp_path: Path) -> None:
    before = _killed_during_the_split_search(tmp_path)
    assert before
    done = subprocess.run(_command(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is finished; nothing to do") == 3, "the supernet and its rivals were trained before the kill"
    search = tmp_path / "tune" / "anchor_query_split"
    lines = [json.loads(line)["key"] for line in (search / "trials.jsonl").read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 6, "no trial lost, none run again"
    assert before < set(lines)
    assert len(TrialRecord(tmp_path / "tune" / "cluster_count").trials) == 3
    verify_manifest(search / "model")
    results = json.loads((search / "results.json").read_text())
    assert set(results["rivals"]) == {"M3", "MQT"}
    assert [split["num_visual_tokens"] for split in results["splits"]] == [16, 64]
    assert list(results["adaptive"]) == ["mixture of the chosen splits", "budget by predictor", "escalate 16 > 64"]
    assert (search / "adaptive" / "predictor" / "predictor.safetensors").is_file()

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert {run.info.status for run in runs} == {"FINISHED"}, "none is left RUNNING, and what the kill left open is ended"
    trials = [run.info.run_name for run in runs if (run.info.run_name or "").startswith("trial-anchor_query_split-")]
    assert sorted(trials) == sorted(f"trial-anchor_query_split-{key}" for key in lines)
    searches = [run for run in runs if (run.info.run_name or "").startswith("tune-anchor_query_split-")]
    assert len(searches) == 1
    figures = {file.path for file in client.list_artifacts(searches[0].info.run_id, "figures")}
    assert {"figures/frontier.png", "figures/splits.png", "figures/adaptive.png"} <= figures
