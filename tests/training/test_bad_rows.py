"""A training names the rows that it cannot use before any step uses them."""

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from parcelray.config.data import ParquetDataConfig
from parcelray.config.train import TrainJob
from parcelray.datasets.mini.export import write_parquet
from parcelray.datasets.parquet import SCHEMA
from parcelray.datasets.source import BadRowsError
from parcelray.training.batches.ray_reading import ray_batches
from parcelray.training.plan import training_plan
from parcelray.training.run import run_training
from parcelray.training.start import build_start, step_reader

from .conftest import tiny_job


@pytest.fixture
def job(tmp_path: Path, tiny_start: dict[str, Any]) -> TrainJob:
    """A training on four rows for each family of the mini suite."""
    for split in ("train", "validation"):
        write_parquet(tmp_path / "data", split, families=("general",), count=4)
    data = {"type": "parquet", "path": str(tmp_path / "data")}
    return tiny_job(tmp_path, data=data, model=tiny_start, training={"steps": 4, "images_per_step": 4})


def _spoil(job: TrainJob, row: int, **changes: Any) -> str:
    """Changes values of a training row; returns the row's id."""
    assert isinstance(job.data, ParquetDataConfig)
    (file,) = (Path(job.data.path) / "train").glob("*.parquet")
    rows = pq.read_table(file).to_pylist()
    rows[row] |= changes
    pq.write_table(pq.read_table(file).from_pylist(rows, schema=SCHEMA), file)
    return str(rows[row]["id"])


@pytest.mark.parametrize("changes", [{"answers": []}, {"images": []}, {"metadata": "{"}])
@pytest.mark.parametrize("start", [training_plan, lambda job: run_training(job, Console(file=io.StringIO()))])
def test_a_row_without_a_part_is_named_before_the_training_starts(
    job: TrainJob, start: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parcelray.training.plan.planned_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("parcelray.training.run.fit_in_process", lambda *_, **__: pytest.fail("the training started"))
    name = _spoil(job, 2, **changes)
    with pytest.raises(
        BadRowsError, match=f"1 row of the training data cannot be used: {name} \\(row 2 of train/general"
    ):
        start(job)


def test_a_row_with_null_metadata_is_trained_on(job: TrainJob) -> None:
    _spoil(job, 1, metadata=None)
    assert run_training(job, Console(file=io.StringIO())).metrics["train/loss"] > 0


def test_an_image_that_cannot_be_decoded_is_named_by_the_step_that_reads_it(job: TrainJob, repo_root: Path) -> None:
    cut = (repo_root / "tests" / "fixtures" / "cases" / "images" / "truncated.jpg").read_bytes()
    name = _spoil(job, 3, images=[{"bytes": cut, "path": None}])
    with pytest.raises(BadRowsError, match=f"{name}: An image of {len(cut)} bytes"):
        run_training(job, Console(file=io.StringIO()))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_all_bad_images_of_a_block_are_named_before_its_first_step(job: TrainJob, tiny_start: dict[str, Any]) -> None:
    names = {_spoil(job, row, images=[{"bytes": b"no image", "path": None}]) for row in (0, 3)}
    reader = step_reader(job, build_start(job, Path(tiny_start["reference"]))[1], 0, 1)
    with pytest.raises(BadRowsError) as caught:
        next(iter(ray_batches(reader, 0, 4, concurrency=1)))
    assert set(caught.value.problems) == names


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_ray_train_does_not_repeat_what_the_user_must_correct(job: TrainJob) -> None:
    name = _spoil(job, 3, images=[{"bytes": b"no image", "path": None}])
    scaling = job.scaling.model_copy(update={"num_workers": 2, "max_failures": -1})
    with pytest.raises(BadRowsError, match=name):
        run_training(job.model_copy(update={"scaling": scaling}), Console(file=io.StringIO()))
