"""Variants of training on Ray: storage, number of workers, sharding, and background validation."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console
from safetensors.torch import load_file

from parcelray.config.train import StorageLimits, TrainJob
from parcelray.datasets.mini.export import write_parquet
from parcelray.datasets.mini.scenes import SPLITS
from parcelray.errors import UserError
from parcelray.models.vlm import load_vlm
from parcelray.training.batches.ray_reading import ray_batches
from parcelray.training.batches.schedule import in_process_batches
from parcelray.training.run import TrainedRun, run_training
from parcelray.training.start import build_start, step_reader

from .conftest import tiny_job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def _train(job: TrainJob) -> TrainedRun:
    return run_training(job, Console(file=io.StringIO()))


def _tracked_job(folder: Path, start: dict[str, Any], **changes: Any) -> TrainJob:
    # All variants start from one checkpoint: workers do not see that the tokenizers of this process are built from
    # fewer texts, and another tokenizer gives other losses.
    return tiny_job(folder, model=start, tracking={"uri": f"sqlite:///{folder}/mlflow.db"}, **changes)


def _curve(job: TrainJob, run: TrainedRun, key: str = "train/loss") -> dict[int, float]:
    assert job.tracking.uri is not None
    assert run.mlflow_run_id is not None
    history = MlflowClient(job.tracking.uri).get_metric_history(run.mlflow_run_id, key)
    assert len({metric.step for metric in history}) == len(history)
    return {metric.step: metric.value for metric in history}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, tiny_start: dict[str, Any]) -> dict[int, float]:
    """Losses of the tiny job without Ray."""
    job = _tracked_job(tmp_path_factory.mktemp("one"), tiny_start)
    return _curve(job, _train(job))


@pytest.mark.parametrize(
    ("rank", "world_size", "first_step"),
    [(1, 2, 13), pytest.param(0, 1, 0, marks=pytest.mark.nightly), pytest.param(0, 2, 0, marks=pytest.mark.nightly)],
)
def test_ray_data_reads_the_same_batches_as_one_process(
    tmp_path: Path, tiny_start: dict[str, Any], rank: int, world_size: int, first_step: int
) -> None:
    # Longer than the first window of steps, so that several windows are read.
    job = tiny_job(tmp_path, training={"steps": 22, "images_per_step": 8, "patch_supervision": 1.0})
    _, processor = build_start(job, Path(tiny_start["reference"]))
    reader = step_reader(job, processor, rank, world_size)
    here = list(in_process_batches(reader, first_step, 22))
    there = list(ray_batches(reader, first_step, 22, concurrency=2))
    assert len(here) == len(there) == 22 - first_step
    for one, two in zip(here, there, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert one[key].dtype == two[key].dtype
            assert np.array_equal(one[key], two[key]), key


@pytest.mark.nightly
def test_an_elastic_number_of_workers_does_not_change_the_losses(
    tmp_path: Path, tiny_start: dict[str, Any], one_process: dict[int, float]
) -> None:
    job = _tracked_job(tmp_path, tiny_start, scaling={"num_workers": [1, 2]})
    # The tolerance is explained in test_trainer.py, where two workers are compared with one process.
    assert _curve(job, _train(job)) == pytest.approx(one_process, rel=1e-3)


@pytest.mark.nightly
def test_fsdp_has_the_losses_of_one_process_and_its_model_loads(
    tmp_path: Path, tiny_start: dict[str, Any], one_process: dict[int, float]
) -> None:
    job = _tracked_job(
        tmp_path,
        tiny_start,
        scaling={"num_workers": 2},
        training={"steps": 6, "images_per_step": 8, "log_every_steps": 1, "strategy": "fsdp"},
    )
    run = _train(job)
    assert _curve(job, run) == pytest.approx(one_process, rel=1e-3)
    model = load_vlm(run.model_folder)
    assert model.connector.name == "parcel"
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini suite as parquet files."""
    folder = tmp_path_factory.mktemp("suite")
    for split in SPLITS:
        write_parquet(folder, split, count=12)
    return folder


SHORT: dict[str, dict[str, Any]] = {
    "training": {"steps": 2, "images_per_step": 8, "log_every_steps": 1},
    "validation": {"samples": 1, "budgets": [16]},
}


@pytest.mark.nightly
def test_training_on_parquet_files_stores_checkpoints_model_and_result_at_a_uri(
    tmp_path: Path, tiny_start: dict[str, Any], suite: Path
) -> None:
    # An fsspec file system that is not the local one, so all accesses use fsspec, as with an object store.
    store = tmp_path / "store"
    changes = SHORT | {"data": {"type": "parquet", "path": str(suite)}, "model": tiny_start}
    job = tiny_job(tmp_path, scaling={"num_workers": 1}, **changes).model_copy(
        update={"storage": f"dir::file://{store}", "storage_limits": StorageLimits(finished_checkpoints=1)}
    )
    run = _train(job)
    assert run.metrics["step"] == 2
    # fsspec resolves this URI to the folder and, below it, the same path again.
    kept = store / store.relative_to("/") / "train" / "tiny"
    assert (kept / "model" / "manifest.json").is_file()
    assert list(kept.glob("*/checkpoint_*/state.json"))
    weights = load_file(kept / "model" / "model.safetensors")
    assert all(
        torch.equal(weights[key], value) for key, value in load_file(run.model_folder / "model.safetensors").items()
    )
    again = _train(job)
    assert again.was_done
    assert again.metrics == run.metrics
    # One process that reads the same files has the same losses.
    here = _train(tiny_job(tmp_path / "here", scaling={"num_workers": 0}, **changes))
    assert run.metrics["train/loss"] == pytest.approx(here.metrics["train/loss"], rel=1e-3)


@pytest.mark.nightly
def test_a_broken_parquet_file_is_a_user_error(tmp_path: Path, suite: Path) -> None:
    broken = tmp_path / "suite"
    shutil.copytree(suite, broken)
    next((broken / "train").glob("video-*")).write_bytes(b"no parquet")
    # A retry would fail in the same way.
    scaling = {"num_workers": 1, "max_failures": 0}
    with pytest.raises(UserError, match=r"video-00000\.parquet is not a parquet file"):
        _train(tiny_job(tmp_path, data={"type": "parquet", "path": str(broken)}, scaling=scaling, **SHORT))


@pytest.mark.nightly
@pytest.mark.parametrize("lora", [None, pytest.param({"decoder": {"rank": 2}}, marks=pytest.mark.nightly)])
def test_background_validation_has_the_scores_of_the_workers_own_validation(
    tmp_path: Path, tiny_start: dict[str, Any], lora: dict[str, Any] | None
) -> None:
    """Background scores equal those of a training in one process that pauses for its validation."""
    scores = {}
    for in_background in (False, True):
        validation = {"samples": 2, "budgets": [16, 64], "every_steps": 2, "in_background": in_background}
        job = _tracked_job(
            tmp_path / str(in_background),
            tiny_start,
            scaling={"num_workers": int(in_background)},
            training={"lora": lora},
            validation=validation,
        )
        run = _train(job)
        scores[in_background] = {key: _curve(job, run, key) for key in ("val/score:16", "val/score:64", "train/loss")}
        assert {"val/score@16", "val/score@64"} <= run.metrics.keys()
    # The worker may have another number of threads than this process, which changes the rounding of a loss.
    assert scores[True].pop("train/loss") == pytest.approx(scores[False].pop("train/loss"), rel=1e-3)
    assert scores[True] == scores[False]
    assert list(scores[True]["val/score:16"]) == [2, 4, 6]


def test_background_validation_needs_workers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation.in_background needs Ray workers, but scaling.num_workers is 0"):
        tiny_job(tmp_path, validation={"in_background": True})
