"""Files that a full disk, a power loss or an interrupted copy left empty or cut: one sentence, or computed again."""

import io
import shutil
import sqlite3
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from parcelray.cli import main
from parcelray.config.evaluate import EvaluateJob
from parcelray.evaluation.run import run_evaluation
from parcelray.tracking.store import ensure_store
from parcelray.training.run import run_training

from .stores import new_store
from .training.conftest import TINY, few_tokenizer_texts, tiny_job

pytestmark = pytest.mark.usefixtures("without_pictures")

ASKED = "runs/evaluate/old/asked/own"
PREDICTIONS = "runs/predictions/own/dc1eef43c6164e44"
Damage = Callable[[Path], None]


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _remove(path: Path) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def _unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(Path(__file__).parent / "fixtures" / "old_layout" / "artefacts.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def project(_unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a project with an evaluation, its predictions, a checkpoint and an interrupted training."""
    folder = tmp_path / "project"
    shutil.copytree(_unpacked, folder)
    monkeypatch.chdir(folder)
    (folder / "checkpoint" / "model" / "manifest.json").unlink()
    job = {
        "kind": "evaluate",
        "name": "new",
        "model": {"reference": "checkpoint/model"},
        "benchmarks": [{"name": "own", "data": "own", "max_new_tokens": 3}],
        "catalog": ["own/own.yaml"],
        "budgets": ["blind", 16, "full"],
        "compute": {"actors": 0},
        "tracking": {"uri": None},
    }
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(job))
    train = TINY | {"name": "new", "model": {"type": "checkpoint", "reference": "checkpoint/model"}, "connector": None}
    (folder / "train.yaml").write_text(yaml.safe_dump(train))
    return folder


def _command(text: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a command of the command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["parcelray", *text.split()])
    with pytest.raises(SystemExit) as exited:
        main()
    return int(exited.value.code or 0)


@pytest.mark.parametrize(
    ("file", "damage", "command"),
    [
        ("runs/evaluate/old/evaluation.json", _empty, "evaluate score runs/evaluate/old"),
        ("runs/evaluate/old/evaluation.json", _cut, "evaluate score runs/evaluate/old"),
        (f"{ASKED}/data.json", _empty, "evaluate score runs/evaluate/old"),
        (f"{ASKED}/data.json", _cut, "evaluate score runs/evaluate/old"),
        (f"{ASKED}/problems.json", _empty, "evaluate score runs/evaluate/old"),
        (f"{ASKED}/samples.parquet", _empty, "evaluate score runs/evaluate/old"),
        (f"{ASKED}/samples.parquet", _cut, "evaluate score runs/evaluate/old"),
        (f"{ASKED}/samples.parquet", _remove, "evaluate score runs/evaluate/old"),
        (f"{PREDICTIONS}/*.parquet", _empty, "evaluate score runs/evaluate/old"),
        (f"{PREDICTIONS}/*.parquet", _cut, "evaluate score runs/evaluate/old"),
        (f"{PREDICTIONS}/*.parquet", _remove, "evaluate score runs/evaluate/old"),
        (f"{PREDICTIONS}/*.parquet", _cut, "evaluate evaluate.yaml"),
        ("checkpoint/model/config.json", _empty, "evaluate evaluate.yaml"),
        ("checkpoint/model/config.json", _cut, "evaluate evaluate.yaml"),
        ("checkpoint/model/config.json", _cut, "train train.yaml"),
        ("checkpoint/model/tokenizer.json", _remove, "evaluate evaluate.yaml"),
        ("checkpoint/model/tokenizer.json", _cut, "train train.yaml"),
        ("checkpoint/model/processor_config.json", _remove, "evaluate evaluate.yaml"),
        ("checkpoint/model/processor_config.json", _cut, "train train.yaml"),
        ("checkpoint/model/model.safetensors", _cut, "train train.yaml"),
        ("checkpoint/model/model.safetensors", _empty, "evaluate evaluate.yaml --set budgets=[64]"),
    ],
)
def test_a_damaged_file_is_one_sentence_and_exit_code_1(
    file: str,
    damage: Damage,
    command: str,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in project.glob(file):
        damage(path)
    assert _command(command, monkeypatch) == 1
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.strip()]
    assert line.startswith("failed: ")
    assert line.endswith(".")


@pytest.mark.parametrize("damage", [_empty, _remove])
@pytest.mark.parametrize(
    "file",
    [
        "runs/evaluate/again/job.json",
        "runs/evaluate/again/result.json",
        "runs/evaluate/again/evaluation.json",
        "runs/evaluate/again/asked/own/data.json",
        "runs/evaluate/again/asked/own/samples.parquet",
        "runs/evaluate/again/asked/own/problems.json",
        "runs/predictions/own/*/*.parquet",
    ],
)
def test_an_evaluation_is_run_again_over_an_empty_file(file: str, damage: Damage, project: Path) -> None:
    data = yaml.safe_load((project / "evaluate.yaml").read_text())
    job = EvaluateJob.model_validate(data | {"name": "again", "budgets": ["blind", 16]})
    first = run_evaluation(job, Console(file=io.StringIO()), tables=False)
    paths = list(project.glob(file))
    assert paths
    for path in paths:
        damage(path)
    again = run_evaluation(job, Console(file=io.StringIO()), tables=False)
    assert again.computed == (first.computed + first.present if "predictions" in file else 0)
    assert all(path.stat().st_size for path in paths if "predictions" not in file)


@pytest.mark.parametrize("file", ["job.json", "result.json", "in-process/checkpoint_00000006/*.json"])
def test_a_training_is_resumed_over_an_empty_file(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_tokenizer_texts(monkeypatch)
    job = tiny_job(tmp_path)
    first = run_training(job, Console(file=io.StringIO()))
    folder = tmp_path / "train" / "tiny"
    for path in folder.glob(file):
        _empty(path)
    (folder / "result.json").write_bytes(b"")
    again = run_training(job, Console(file=io.StringIO()))
    assert not again.was_done
    assert again.metrics["train/loss"] == pytest.approx(first.metrics["train/loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("storage", "command"),
    [
        ("own/own.yaml", "evaluate evaluate.yaml"),
        ("own/own.yaml/deeper", "evaluate evaluate.yaml"),
        ("own/own.yaml", "train train.yaml"),
    ],
)
def test_storage_that_is_a_file_is_one_sentence(
    storage: str,
    command: str,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _command(f"{command} --set storage={storage}", monkeypatch) == 1
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.strip()]
    assert line.startswith("failed: ")
    assert "own.yaml" in line
    assert "file" in line


def test_a_locked_database_is_one_sentence(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("parcelray.tracking.store._LOCK_TIMEOUT_S", 0.1)
    uri = ensure_store(new_store(project / "store"))
    other = sqlite3.connect(project / "store" / "mlflow.db")
    other.execute("BEGIN EXCLUSIVE")
    try:
        assert _command(f"evaluate evaluate.yaml --set tracking.uri={uri}", monkeypatch) == 1
    finally:
        other.close()
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("failed: ")
    assert "another process holds a lock on this database" in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"no database" * 100), "this file is not a SQLite database"),
        (lambda path: path.mkdir(), "this database cannot be opened"),
    ],
)
def test_an_unusable_database_is_one_sentence(
    make: Callable[[Path], object],
    words: str,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(project / "mlflow.db")
    assert _command("evaluate evaluate.yaml --set tracking.uri=sqlite:///mlflow.db", monkeypatch) == 1
    shown = capsys.readouterr().err.strip()
    assert words in shown
    assert len(shown.splitlines()) == 1
