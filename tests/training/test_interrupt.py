"""Ctrl-C ends a training with one message, exit code 130 and the MLflow status KILLED, with Ray and without."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from mlflow import MlflowClient

from parcelray import cli
from parcelray.training import trainer
from parcelray.training.trainer import interrupt_handler

from ..processes import LIMIT_S, own_ray, wait_until
from .conftest import TINY

MESSAGE = "Stopped. The steps up to the newest checkpoint are kept; run the same command again to resume."


class _Controller:
    """Ray Train's controller, whose process ends while it aborts the run."""

    def __init__(self) -> None:
        self.aborted = 0
        self.abort = self

    def remote(self) -> "_Controller":
        self.aborted += 1
        return self


class _Trainer(trainer._InterruptibleTrainer):
    """A trainer that receives Ctrl-C as soon as the controller runs."""

    controller = _Controller()

    def __init__(self, *_: object, **__: object) -> None: ...

    def fit(self) -> Any:
        self._register_sigint_handler(self.controller)
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _nothing(*_: object) -> Iterator[None]:
    yield


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> _Controller:
    """Replaces Ray by a trainer that is interrupted, and the training in this process by one that is."""

    def dies(controller: object, timeout: float) -> None:
        raise ray.exceptions.ActorDiedError

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    controller = _Controller()
    monkeypatch.setattr(_Trainer, "controller", controller)
    monkeypatch.setattr(trainer, "_InterruptibleTrainer", _Trainer)
    monkeypatch.setattr(trainer, "watched_progress", _nothing)
    monkeypatch.setattr("parcelray.training.run.await_capacity", _nothing)
    monkeypatch.setattr("parcelray.training.run.check_inputs", _nothing)
    monkeypatch.setattr(ray, "get", dies)
    monkeypatch.setattr("parcelray.training.run.ray_session", _nothing)
    monkeypatch.setattr("parcelray.training.run.num_nodes", lambda: 1)
    monkeypatch.setattr("parcelray.training.run.fit_in_process", stop)
    return controller


def _job_file(folder: Path, start: dict[str, Any], **changes: Any) -> Path:
    tracking = {"uri": f"sqlite:///{folder}/mlflow.db"}
    job = TINY | {"model": start, "storage": str(folder / "runs"), "tracking": tracking} | changes
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return folder / "job.yaml"


def _status(folder: Path) -> str:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return str(run.info.status)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ctrl_c_ends_a_training_with_one_message_and_the_status_killed(
    tmp_path: Path,
    tiny_start: dict[str, Any],
    num_workers: int,
    interrupted: _Controller,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGINT)
    path = _job_file(tmp_path, tiny_start, scaling={"num_workers": num_workers})
    monkeypatch.setattr(sys, "argv", ["parcelray", "train", str(path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert _status(tmp_path) == "KILLED"
    assert " ".join(capsys.readouterr().err.split()) == MESSAGE
    assert interrupted.aborted == num_workers
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_workers() -> None:
    before = signal.getsignal(signal.SIGINT)

    def abort() -> None:
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second Ctrl-C was ignored")

    try:
        signal.signal(signal.SIGINT, interrupt_handler(abort))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_training_on_ray(
    tmp_path: Path, tiny_start: dict[str, Any], number: signal.Signals, code: int
) -> None:
    # Long enough to be interrupted before its end.
    training = TINY["training"] | {"steps": 400}
    path = _job_file(tmp_path, tiny_start, training=training, scaling={"num_workers": 1})
    command = [sys.executable, "-m", "parcelray.cli", "train", str(path)]
    driver = subprocess.Popen(
        command, env=own_ray(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_until(
        lambda: list(tmp_path.glob("runs/train/tiny/*/checkpoint_*/state.json")), "a checkpoint is stored", driver
    )
    driver.send_signal(number)
    errors = driver.communicate(timeout=LIMIT_S)[1].decode()
    assert driver.returncode == code, errors
    assert _status(tmp_path) == "KILLED"
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert " ".join(errors.split()).count(MESSAGE) == 1
