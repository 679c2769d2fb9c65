"""Artefacts made before the modules moved (commit 18c69cd, November 2026) still work, or one sentence says what to do.

`fixtures/old_layout/artefacts.tar.xz` was made by the code of that commit: a checkpoint with a manifest, a benchmark
with its evaluation and stored predictions, a finished and an interrupted training, and the files of a registered MLflow
version. A search of that layout is tested in `tuning/test_old_search.py`.
"""

import io
import json
import tarfile
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.evaluation.run import run_evaluation
from parcelray.models.checkpoint import resolve_checkpoint, verify_manifest
from parcelray.models.vlm import load_vlm
from parcelray.training.run import run_training

from .training.conftest import few_tokenizer_texts, tiny_job


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked artefacts."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "fixtures" / "old_layout" / "artefacts.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def _console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_checkpoint_is_verified_and_loads(old: Path) -> None:
    verify_manifest(old / "checkpoint" / "model")
    checkpoint = resolve_checkpoint(old / "checkpoint" / "model")
    model = load_vlm(checkpoint.path)
    assert checkpoint.pinned.startswith("sha256:dc1eef43c6164e44")
    assert model.supported_budgets


def test_stored_predictions_are_reused_and_give_the_same_scores(old: Path) -> None:
    before = json.loads((old / "runs" / "evaluate" / "old" / "result.json").read_text(encoding="utf-8"))
    job = EvaluateJob.model_validate(
        {
            "kind": "evaluate",
            "name": "old",
            "model": {"reference": str(old / "checkpoint" / "model")},
            "benchmarks": [{"name": "own", "data": str(old / "own"), "max_new_tokens": 3}],
            "catalog": [str(old / "own" / "own.yaml")],
            "budgets": ["blind", 16, "full"],
            "compute": {"actors": 0},
            "tracking": {"uri": None},
            "storage": str(old / "runs"),
        }
    )
    # The paths of the benchmark's files are part of the run's identity: this is another run over the same predictions.
    run = run_evaluation(job.model_copy(update={"name": "again"}), _console())
    assert (run.computed, run.present) == (0, 18)
    after = json.loads((old / "runs" / "evaluate" / "again" / "result.json").read_text(encoding="utf-8"))
    assert after["splits"] == before["splits"]


def test_a_finished_training_is_recognised(old: Path) -> None:
    run = run_training(tiny_job(old / "done", name="old"), _console())
    assert run.was_done
    assert run.metrics["val/score@16"] == 0.0


def test_an_interrupted_training_resumes_from_its_checkpoint(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_tokenizer_texts(monkeypatch)
    reports: list[object] = []
    run = run_training(tiny_job(old / "runs", name="old"), _console(), on_report=reports.append)
    finished = json.loads((old / "done" / "train" / "old" / "result.json").read_text(encoding="utf-8"))
    assert not run.was_done
    # Relative 1e-3: the runs were on different machines and kernels.
    assert run.metrics["train/loss"] == pytest.approx(finished["metrics"]["train/loss"], rel=1e-3)
    assert len(reports) == 1, "from scratch there would be one at step 3 and one at step 6"


def test_the_error_of_an_old_mlflow_version_names_the_fix(old: Path) -> None:
    import mlflow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(mlflow.MlflowException, match=r"before its modules moved .* register it again"):
            mlflow.pyfunc.load_model(str(old / "mlflow_version"))
