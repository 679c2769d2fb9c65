"""`make search`: the jobs that it runs, and the whole script with a small job, whose driver is killed and restarted."""

import io
import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import ConfigError
from parcelray.files import open_storage
from parcelray.models.manifest import verify_manifest
from parcelray.tuning.trial_record import TrialRecord

from ..stores import new_store
from .scripts import kill_script, run_script, script, sets


def test_overrides_apply_to_the_supernet_or_to_the_search_that_they_name(tmp_path: Path) -> None:
    changes = [f"storage={tmp_path}", "training.steps=2", "splits.adaptive.budgets=[16, 64]", "clusters.seed=7"]
    supernet, splits, clusters = script("search").jobs_of(changes)
    assert (supernet.training.steps, clusters.seed) == (2, 7)
    assert splits.seed != 7
    assert splits.adaptive is not None
    assert splits.adaptive.budgets == (16, 64)
    assert {supernet.storage, splits.storage, clusters.storage, splits.base.storage} == {str(tmp_path)}
    assert {splits.tracking.uri, clusters.tracking.uri} == {supernet.tracking.uri}
    # The search evaluates the supernet; the baselines are trained for as many steps as the supernet.
    trained = tmp_path / "train"
    assert isinstance(splits.base, EvaluateJob)
    assert splits.base.model.reference == str(trained / "supernet" / "model")
    assert splits.baselines == {name.upper(): str(trained / f"supernet-{name}" / "model") for name in ("m3", "mqt")}
    with pytest.raises(ConfigError, match="stepz is not a known key"):
        script("search").jobs_of(["training.stepz=2"])


def test_baselines_differ_from_the_supernet_in_connector_and_budgets_only() -> None:
    search = script("search")
    supernet, _, _ = search.jobs_of(["training.steps=2"])
    for baseline in search.BASELINES:
        job = search.baseline_job(supernet, baseline)
        differing = {key for key, value in job.model_dump().items() if value != supernet.model_dump()[key]}
        assert differing == {"name", "connector", "budget"}
        assert job.connector is not None
        assert job.connector.type == baseline


def _arguments(folder: Path, storage: str | None = None) -> list[str]:
    # As few processes as possible, because starting them takes nearly all of the time.
    return sets(
        f"storage={storage or folder}",
        f"tracking.uri={new_store(folder)}",
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


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_search_is_resumed_and_logs_its_frontiers_to_mlflow(tmp_path: Path) -> None:
    command = ("search", *_arguments(tmp_path))
    trials_of = tmp_path / "tune" / "anchor_query_split"
    kill_script(*command, log=tmp_path / "killed.log", when=lambda: bool(TrialRecord(trials_of).trials))
    before = {trial.key for trial in TrialRecord(trials_of).trials}
    done = run_script(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is finished; nothing to do") == 3, (
        "the supernet and the baselines were trained before the kill"
    )
    search = tmp_path / "tune" / "anchor_query_split"
    lines = [json.loads(line)["key"] for line in (search / "trials.jsonl").read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 6, "no trial is lost or run again"
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
    assert {run.info.status for run in runs} == {"FINISHED"}, (
        "no run is left RUNNING, not even those of the killed driver"
    )
    trials = [run.info.run_name for run in runs if (run.info.run_name or "").startswith("trial-anchor_query_split-")]
    assert sorted(trials) == sorted(f"trial-anchor_query_split-{key}" for key in lines)
    searches = [run for run in runs if (run.info.run_name or "").startswith("tune-anchor_query_split-")]
    assert len(searches) == 1
    figures = {file.path for file in client.list_artifacts(searches[0].info.run_id, "figures")}
    assert {"figures/frontier.png", "figures/splits.png", "figures/adaptive.png"} <= figures


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_search_on_object_storage_is_confirmed_and_resumed(
    ray_session: None, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    confirmation = "training={steps: 2, images_per_step: 4}", "validation={samples: 1, budgets: [64]}"
    changes = sets(*(f"splits.confirm.job.{change}" for change in confirmation))
    arguments = ["--confirm", *_arguments(tmp_path / "tracking", s3), *changes]
    search = script("search")

    def run() -> str:
        output = io.StringIO()
        search.run(arguments, Console(file=output, width=200))
        return output.getvalue()

    run()
    filesystem, root = open_storage(s3)
    splits = f"{root}/tune/anchor_query_split"
    assert set(json.loads(filesystem.cat_file(f"{splits}/results.json"))["rivals"]) == {"M3", "MQT"}
    confirmed = json.loads(filesystem.cat_file(f"{splits}/confirmation.json"))["splits"]
    assert {split["anchor_grid"] for split in confirmed} == {0, 2, 4}
    evaluated = {name.rpartition("/")[2] for name in filesystem.ls(f"{root}/evaluate", detail=False)}
    assert {f"anchor_query_split-confirm-64-{grid}" for grid in (0, 2, 4)} < evaluated

    # A driver that was killed before it recorded the last trial.
    filesystem.rm_file(filesystem.find(f"{splits}/trials.jsonl")[-1])
    predictions = filesystem.find(f"{root}/predictions")
    printed = run()
    assert "6 trials, 5 of them finished" in printed
    assert len(filesystem.find(f"{splits}/trials.jsonl")) == 6
    assert filesystem.find(f"{root}/predictions") == predictions, "all predictions were reused"
    assert {path.name for path in tmp_path.iterdir()} == {"tracking"}, "nothing is written below the working folder"
