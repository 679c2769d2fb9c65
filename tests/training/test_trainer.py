"""Training on Ray Train: nothing is lost when a worker or the driver dies, and MLflow has one complete run."""

import functools
import io
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from mlflow import MlflowClient
from rich.console import Console
from safetensors.torch import load_file

from parcelray.config.train import TrainJob
from parcelray.datasets.mini.export import write_parquet
from parcelray.errors import SystemFailure, UserError
from parcelray.models.manifest import verify_manifest
from parcelray.training.run import TrainedRun, run_training
from parcelray.training.train_loop import fit_in_process

from ..processes import LIMIT_S, end_session, own_ray, wait_until
from .conftest import TINY
from .metric_loggers import Losses, kills_once

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

JOB: dict[str, Any] = TINY | {
    "training": {"steps": 8, "images_per_step": 8, "log_every_steps": 1},
    "validation": {"samples": 2, "budgets": [16]},
    "scaling": {"num_workers": 2},
}


def _job(storage: Path, start: dict[str, Any], **changes: Any) -> TrainJob:
    tracking = {"uri": f"sqlite:///{storage}/mlflow.db"}
    return TrainJob.model_validate(JOB | {"model": start, "storage": str(storage), "tracking": tracking} | changes)


def _same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def _steps(uri: str, run_id: str, key: str) -> list[int]:
    return [metric.step for metric in MlflowClient(uri).get_metric_history(run_id, key)]


class KilledRun(NamedTuple):
    """A finished training of which a worker was killed with SIGKILL after step 5."""

    job: TrainJob
    run: TrainedRun
    steps: str
    """Steps of rank 0 in the order in which it trained them."""
    modules: set[str]
    """Modules that the controller had loaded at a checkpoint."""
    output: str
    """What the driver printed."""


@pytest.fixture(scope="module")
def killed(ray_session: None, tiny_start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> KilledRun:
    folder = tmp_path_factory.mktemp("run")
    job = _job(folder, tiny_start)
    steps, loaded = folder / "steps", folder / "modules"

    def note(metrics: Mapping[str, float]) -> None:
        loaded.write_text(" ".join(sys.modules), encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parcelray.training.run.open_metric_logger", functools.partial(kills_once, steps, loaded))
        output = io.StringIO()
        run = run_training(job, Console(file=output), on_report=note)
    modules = set(loaded.read_text(encoding="utf-8").split())
    return KilledRun(job, run, steps.read_text(encoding="utf-8"), modules, output.getvalue())


def test_the_controller_loads_neither_the_models_libraries_nor_mlflow(killed: KilledRun) -> None:
    assert "parcelray.training.ray_worker" in killed.modules, "the modules are those of the controller"
    assert not {"transformers", "mlflow"} & killed.modules


def test_a_run_whose_worker_was_killed_is_recorded_once_and_completely(killed: KilledRun) -> None:
    job, run = killed.job, killed.run
    assert killed.steps == "1 2 3 4 5 4 5 6 7 8", "resumed from the checkpoint of step 3"
    assert verify_manifest(run.model_folder).seed == 3
    assert job.tracking.uri is not None
    assert run.mlflow_run_id is not None
    client = MlflowClient(job.tracking.uri)
    record = client.get_run(run.mlflow_run_id)
    assert record.info.status == "FINISHED"
    assert record.data.params["connector.type"] == "parcel"
    assert _steps(job.tracking.uri, run.mlflow_run_id, "train/loss") == list(range(1, 9))
    expected = {
        "train/learning_rate",
        "train/grad_norm",
        "train/tokens_per_second",
        "train/budget",
        "tokens/anchors_effective_rank",
        "tokens/queries_mean_cosine",
    }
    assert expected <= set(record.data.metrics)
    assert len(client.search_runs([record.info.experiment_id])) == 1


def test_the_driver_says_which_worker_failed_and_where_the_training_resumes(killed: KilledRun) -> None:
    lines = killed.output.splitlines()
    failed, restart, resumed = (
        next(index for index, line in enumerate(lines) if line.startswith(start))
        for start in ("The worker of rank", "All workers start again", "The training resumes after step 3 of 8.")
    )
    assert failed < restart < resumed, killed.output


def test_two_workers_of_which_one_was_killed_have_the_losses_of_one_process(
    killed: KilledRun, tiny_start: dict[str, Any], tmp_path: Path
) -> None:
    job, run = killed.job, killed.run
    assert job.tracking.uri is not None
    assert run.mlflow_run_id is not None
    of_workers = {
        each.step: each.value
        for each in MlflowClient(job.tracking.uri).get_metric_history(run.mlflow_run_id, "train/loss")
    }
    of_one_process = Losses()
    alone = _job(tmp_path, tiny_start, scaling={"num_workers": 0})
    fit_in_process(alone, tmp_path / "one", checkpoint=Path(tiny_start["reference"]), logger=of_one_process)
    # The losses agree to rounding (about 1e-6), which depends on a process's batch size; a lost or repeated sample
    # changes them by percents.
    assert of_workers == pytest.approx(of_one_process.losses, rel=1e-3)


def test_a_second_run_is_a_no_op_and_another_configuration_is_refused(killed: KilledRun) -> None:
    job, run = killed.job, killed.run
    output = io.StringIO()
    again = run_training(job, Console(file=output, width=200))
    assert again.was_done
    assert again.model_folder == run.model_folder
    assert "nothing to do" in output.getvalue()
    with pytest.raises(UserError, match=r"differs from this one \(seed: 3 -> 4\); give this run another name"):
        run_training(job.model_copy(update={"seed": 4}), Console(file=output))


@pytest.mark.nightly
def test_a_killed_worker_does_not_change_the_weights(
    killed: KilledRun, tiny_start: dict[str, Any], tmp_path: Path
) -> None:
    uninterrupted = run_training(_job(tmp_path, tiny_start), Console(file=io.StringIO()))
    # Bit-identical: both runs have the same batches, shapes and threads, and gloo sums two workers' gradients to the
    # same value in either order. The result depends neither on the machine's load nor on its kind.
    assert _same_weights(killed.run.model_folder, uninterrupted.model_folder)


@pytest.mark.nightly
def test_workers_in_another_folder_read_relative_paths_and_an_empty_snapshot_starts_again(
    ray_session: None, tiny_start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "validation"):
        write_parquet(tmp_path / "own", split, families=("general",), count=16)
    monkeypatch.chdir(tmp_path)
    changes = {
        "data": {"type": "parquet", "path": "own"},
        "training": {"steps": 2, "images_per_step": 4, "log_every_steps": 1},
        "scaling": {"num_workers": 1},
        "tracking": {"uri": "sqlite:///runs/mlflow.db"},
        "storage": "runs",
    }
    job = TrainJob.model_validate(JOB | {"model": tiny_start} | changes)
    first = run_training(job, Console(file=io.StringIO()))
    folder = tmp_path / "runs" / "train" / "tiny"
    assert first.model_folder == folder / "model"
    (snapshot,) = folder.rglob("checkpoint_manager_snapshot.json")
    snapshot.write_bytes(b"")
    (folder / "result.json").write_bytes(b"")
    again = run_training(job, Console(file=io.StringIO()))
    assert not again.was_done
    assert again.metrics["train/loss"] == pytest.approx(first.metrics["train/loss"], rel=1e-3)
    (folder / "result.json").write_bytes(b"")
    snapshot.write_bytes(b'{"ray_version": ')
    with pytest.raises(SystemFailure, match=r"checkpoint_manager_snapshot.json is damaged: .* or remove the folder"):
        run_training(job, Console(file=io.StringIO()))


def test_more_workers_than_the_cluster_has_are_refused(
    ray_session: None, tiny_start: dict[str, Any], tmp_path: Path
) -> None:
    job = _job(tmp_path, tiny_start, scaling={"num_workers": 9, "cpus_per_worker": 2})
    message = "needs 9 workers of 2 CPU each and 1 data task of 0.5 CPU, but the Ray cluster has only 1 node of 4 CPU"
    with pytest.raises(UserError, match=message):
        run_training(job, Console(file=io.StringIO()))


@pytest.mark.nightly
def test_the_same_command_resumes_after_a_killed_driver(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    # Long enough to be killed before it ends: after the first checkpoint, 37 steps and 12 checkpoints remain.
    changes = {"training": JOB["training"] | {"steps": 40}, "scaling": {"num_workers": 1}}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | {"storage": str(storage), "tracking": {"uri": uri}} | changes))
    command = [sys.executable, "-m", "parcelray.cli", "train", str(path)]
    silent: dict[str, Any] = {"env": own_ray(), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    driver = subprocess.Popen(command, start_new_session=True, **silent)
    wait_until(lambda: list(storage.glob("train/tiny/*/checkpoint_*/state.json")), "a checkpoint is stored", driver)
    driver.kill()
    driver.wait()
    # The driver's Ray processes outlive it; end those of the session that this test started.
    end_session(driver.pid)
    assert not (storage / "train" / "tiny" / "result.json").exists()
    subprocess.run(command, check=True, timeout=LIMIT_S, **silent)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]
    steps = _steps(uri, runs[0].info.run_id, "train/loss")
    assert sorted(steps) == sorted(set(steps))
    assert steps[-1] == 40
