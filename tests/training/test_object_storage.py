"""Jobs on object storage: the same results as on a disk, read by URI, also while the store does not answer."""

import io
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from rich.console import Console
from safetensors.torch import load_file

from parcelray.config.train import TrainJob
from parcelray.config.tune import TuneJob
from parcelray.evaluation.compare import compare_evaluations
from parcelray.evaluation.scoring.summary import rescore
from parcelray.files import open_storage
from parcelray.models.manifest import verify_manifest
from parcelray.tracking.run_folder import RunFolder
from parcelray.tracking.runs import list_runs, pull_run
from parcelray.training.run import TrainedRun, run_training
from parcelray.tuning.run import SearchRun, run_tuning

from ..object_storage import FaultyProxy
from ..processes import wait_until
from ..stores import new_store
from .conftest import TINY, tiny_job

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

REFUSED_S = 10.0
"""Time for which the store refuses connections after each checkpoint, seconds."""
STOPPED_S = 30.0
"""Time for which the store does not answer, seconds."""


def _console() -> Console:
    return Console(file=io.StringIO(), width=200)


def _same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def _without_speed(run: TrainedRun) -> dict[str, float]:
    return {name: value for name, value in run.metrics.items() if name != "train/tokens_per_second"}


def _files(uri: str) -> list[str]:
    filesystem, path = open_storage(uri)
    return [name.removeprefix(f"{path}/") for name in filesystem.find(path)]


def _in_background(function: Any) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


class FailsAt(Exception):
    """Ends a training in the middle."""


class FakeGcs(MemoryFileSystem):  # type: ignore[misc]
    """Stands for gcsfs, which is not installed for the tests: another file system of fsspec for gs://."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("gs://")))

    def unstrip_protocol(self, name: str) -> str:
        return f"gs:/{name}"


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns an empty folder on object storage of each kind."""
    s3: str = request.getfixturevalue("s3")
    if request.param == "s3":
        return s3
    monkeypatch.setitem(_registry, "gs", FakeGcs)
    return s3.replace("s3://", "gs://")


def test_a_training_in_a_process_resumes_on_another_host(store: str, tmp_path: Path) -> None:
    job = tiny_job(tmp_path, report={"samples": 2, "budgets": [16]})
    on_disk = run_training(job, _console())
    remote = job.model_copy(update={"storage": store})

    def fail(metrics: Any) -> None:
        raise FailsAt

    with pytest.raises(FailsAt):
        run_training(remote, _console(), on_report=fail)
    assert RunFolder(remote).names("in-process") == ["checkpoint_00000003"]
    steps: list[Any] = []
    run = run_training(remote, _console(), on_report=steps.append)
    assert [each["step"] for each in steps] == [6.0], "it resumed from the checkpoint in the store"
    assert _same_weights(run.model_folder, on_disk.model_folder)
    assert run.model == f"{store}/train/tiny/model"
    # Checkpoints of a finished training are removed from object storage, unless the job keeps them.
    assert not [name for name in _files(store) if "checkpoint_" in name]
    again = run_training(remote, _console())
    assert again.was_done
    assert again.metrics == run.metrics
    assert verify_manifest(again.model_folder).seed == 3
    assert {each.name: each.state for each in list_runs(store).runs} == {
        "train/tiny": "finished",
        "evaluate/tiny-test": "finished",
    }
    assert rescore(pull_run(f"{store}/evaluate/tiny-test", "", tmp_path / "laptop"), {}, 5.0).budgets == (0, 16)


def test_a_truncated_checkpoint_is_not_used(s3: str, tmp_path: Path) -> None:
    job = tiny_job(tmp_path, checkpointing={"every_steps": 2}).model_copy(update={"storage": s3})
    reports: list[Any] = []

    def fail_at_step_4(metrics: Any) -> None:
        reports.append(metrics)
        if metrics["step"] == 4:
            raise FailsAt

    with pytest.raises(FailsAt):
        run_training(job, _console(), on_report=fail_at_step_4)
    folder = RunFolder(job)
    path = f"{folder.path}/in-process/checkpoint_00000004/optimizer.pt"
    folder.filesystem.pipe_file(path, folder.filesystem.cat_file(path)[:100])
    reports.clear()
    run_training(job, _console(), on_report=reports.append)
    assert [each["step"] for each in reports] == [4.0, 6.0]


def test_a_job_in_a_process_survives_a_store_that_refuses_connections(
    s3: str, faulty_s3: FaultyProxy, tmp_path: Path
) -> None:
    job = tiny_job(tmp_path, checkpointing={"every_steps": 2}, report={"samples": 2, "budgets": [16]})
    on_disk = run_training(job, _console())

    def refuse_for_a_while(metrics: Any) -> None:
        faulty_s3.fail("refuse")
        threading.Timer(REFUSED_S, faulty_s3.work).start()

    run = run_training(job.model_copy(update={"storage": s3}), _console(), on_report=refuse_for_a_while)
    assert _same_weights(run.model_folder, on_disk.model_folder)
    assert _without_speed(run) == pytest.approx(_without_speed(on_disk), nan_ok=True)


@pytest.fixture(scope="module")
def on_ray(
    ray_session: None,
    s3_process: subprocess.Popen[bytes],
    tiny_start: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TrainJob, TrainedRun, TrainedRun]:
    """A training of two workers with a report, undisturbed on a disk, and on a store that stops answering."""
    folder = tmp_path_factory.mktemp("on-ray")
    data = TINY | {
        "model": tiny_start,
        "training": {"steps": 8, "images_per_step": 8, "log_every_steps": 1},
        "validation": {"samples": 2, "budgets": [16]},
        "report": {"samples": 2, "budgets": [16]},
        "scaling": {"num_workers": 2},
        "storage": str(folder),
    }
    on_disk = run_training(TrainJob.model_validate(data), _console())
    job = TrainJob.model_validate(data | {"storage": f"s3://bucket{folder}"})

    def stop_for_a_while() -> None:
        wait_until(lambda: any("state.json" in name for name in _files(job.storage)), "a checkpoint is stored")
        s3_process.send_signal(signal.SIGSTOP)
        time.sleep(STOPPED_S)
        s3_process.send_signal(signal.SIGCONT)

    thread = _in_background(stop_for_a_while)
    run = run_training(job, _console())
    thread.join()
    return job, on_disk, run


@pytest.mark.ray
def test_a_training_on_ray_survives_a_store_that_does_not_answer(
    on_ray: tuple[TrainJob, TrainedRun, TrainedRun],
) -> None:
    _, on_disk, run = on_ray
    assert _same_weights(run.model_folder, on_disk.model_folder)
    assert _without_speed(run) == pytest.approx(_without_speed(on_disk), nan_ok=True)
    assert "test/score@16" in run.metrics
    files = _files(run.folder.uri)
    assert {"frontier.json", "frontier.png", "model/manifest.json", "result.json"} <= set(files)
    assert not [name for name in files if "checkpoint_0" in name or "checkpoint_2" in name]


@pytest.mark.ray
def test_results_are_read_by_uri_and_copied_to_a_laptop(
    on_ray: tuple[TrainJob, TrainedRun, TrainedRun], tmp_path: Path
) -> None:
    job, on_disk, _ = on_ray
    uri = f"{job.storage}/evaluate/tiny-test"
    assert (
        rescore(uri, {}, 5.0).to_dict()
        == rescore(f"{on_disk.folder.local.parents[1]}/evaluate/tiny-test", {}, 5.0).to_dict()
    )
    assert compare_evaluations(f"{uri}@16", f"{uri}@blind").pairs
    assert {run.name: run.state for run in list_runs(job.storage).runs} == {
        "train/tiny": "finished",
        "evaluate/tiny-test": "finished",
    }
    copied = pull_run(uri, "", tmp_path / "laptop")
    filesystem, path = open_storage(job.storage)
    filesystem.rm(f"{path}/predictions", recursive=True)
    assert rescore(copied, {}, 5.0).budgets == (0, 16)


@pytest.mark.ray
def test_the_checkpoint_before_a_truncated_one_is_used_on_ray(on_ray: tuple[TrainJob, TrainedRun, TrainedRun]) -> None:
    job, on_disk, run = on_ray
    folder = on_disk.folder
    checkpoints = [name for name in folder.names(folder.identity) if name.startswith("checkpoint_2")]
    assert len(checkpoints) == 2
    newest = folder.local / folder.identity / checkpoints[-1] / "model" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    (folder.local / "result.json").unlink()
    again = run_training(job.model_copy(update={"storage": str(folder.local.parents[1])}), _console(), report=False)
    assert not again.was_done
    assert _same_weights(again.model_folder, run.model_folder)


def _search(storage: str, tracking: str, start: dict[str, Any], **changes: Any) -> TuneJob:
    base = TINY | {
        "name": "base",
        "model": start,
        "optimizer": {"type": "adamw"},
        "training": {"steps": 4, "images_per_step": 4, "log_every_steps": 1},
        "validation": {"samples": 1, "budgets": [16]},
        "checkpointing": {"every_steps": 1},
    }
    data = {
        "kind": "tune",
        "name": "rates",
        "space": {
            "kind": "search_space",
            "name": "rates",
            "job": "none",
            "parameters": {"optimizer.learning_rate": {"type": "choice", "values": [1e-4, 1e-3]}},
        },
        "base": base | changes.pop("base", {}),
        "algorithm": {"type": "grid"},
        "objectives": [{"metric": "train/loss", "mode": "min"}],
        "tracking": {"uri": tracking},
        "storage": storage,
    }
    return TuneJob.model_validate(data | changes)


def _run(job: TuneJob, **options: Any) -> SearchRun:
    return run_tuning(job, _console(), **options)


@pytest.mark.ray
def test_a_search_over_trainings_is_stored_and_resumed(
    ray_session: None, s3: str, tmp_path: Path, tiny_start: dict[str, Any]
) -> None:
    job = _search(
        s3,
        new_store(tmp_path),
        tiny_start,
        early_stopping={"type": "asha", "grace_steps": 1},
        max_concurrent=1,
        base={"scaling": {"num_workers": 1}},
    )
    run = _run(job)
    assert [trial.error for trial in run.findings.trials] == [None, None]
    files = _files(f"{s3}/tune/rates")
    assert len([name for name in files if name.startswith("trials.jsonl/")]) == 2
    assert {"results.json", "parallel.png", "result.json"} <= set(files)
    assert [name for name in files if name.endswith("/model/model.safetensors")]
    # A driver that was killed after the first trial.
    filesystem, path = open_storage(s3)
    newest = filesystem.find(f"{path}/tune/rates/trials.jsonl")[-1]
    filesystem.rm_file(newest)
    resumed = _run(job, resume=True)
    assert [trial.key for trial in resumed.findings.trials] == [trial.key for trial in run.findings.trials]
    assert len(filesystem.find(f"{path}/tune/rates/trials.jsonl")) == 2


@pytest.mark.ray
def test_members_of_a_population_exchange_their_models_by_uri(
    ray_session: None, s3: str, tmp_path: Path, tiny_start: dict[str, Any]
) -> None:
    job = _search(s3, new_store(tmp_path), tiny_start, algorithm={"type": "pbt", "population": 2, "segments": 2})
    run = _run(job)
    assert [trial.error for trial in run.findings.trials] == [None, None]
