"""Export of the mini suite to parquet, and reading of the files."""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parcelray.datasets.mini import family_samples
from parcelray.datasets.mini.export import write_parquet
from parcelray.datasets.parquet import SCHEMA, ParquetSource
from parcelray.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("parcelray.datasets.mini.export.ROWS_PER_SHARD", 10)
    write_parquet(tmp_path / "mini", "test", ("general", "video"), count=24, seed=3)
    return tmp_path / "mini" / "test"


def test_reading_returns_the_exported_samples(folder):
    written = {
        sample.id: sample for family in ("general", "video") for sample in family_samples("test", family, 24, seed=3)
    }
    source = ParquetSource(folder)
    read = [source.get(group.name, index) for group in source.groups for index in range(group.size or 0)]
    assert {sample.id: sample for sample in read} == written
    assert len(read) == len(written) == 48


def test_groups_are_formed_by_the_number_of_images(folder):
    groups = ParquetSource(folder).groups
    assert [(group.name, group.num_images, group.size) for group in groups] == [
        ("images-1", 1, 15),
        ("images-2", 2, 9),
        ("images-4", 4, 24),
    ]
    assert sum(group.weight for group in groups) == pytest.approx(1)
    source = ParquetSource(folder)
    assert {len(source.get("images-2", index).images) for index in range(9)} == {2}


def test_files_have_the_expected_names_schema_and_rows(folder):
    files = sorted(path.name for path in folder.iterdir())
    assert files == [f"{family}-{shard:05d}.parquet" for family in ("general", "video") for shard in range(3)]
    assert pq.read_schema(folder / files[0]).equals(SCHEMA)
    assert ParquetSource(folder, "video-*.parquet").groups[0].size == 24
    assert ParquetSource(folder / files[-1]).groups[0].size == 4


def test_a_source_is_pickled_without_its_data(folder):
    source = ParquetSource(folder)
    sample = source.get("images-1", 3)
    state = pickle.dumps(source)
    assert len(state) < 500
    assert pickle.loads(state).get("images-1", 3) == sample


def test_invalid_files_and_groups_are_rejected(folder, tmp_path):
    with pytest.raises(UserError, match="no files that match"):
        _ = ParquetSource(tmp_path / "nothing").groups
    with pytest.raises(UserError, match=r"'images-3'.*images-1, images-2, images-4"):
        ParquetSource(folder).get("images-3", 0)
    with pytest.raises(IndexError):
        ParquetSource(folder).get("images-2", 9)
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "poor.parquet")
    with pytest.raises(UserError, match="lacks the columns benchmark"):
        _ = ParquetSource(tmp_path / "poor.parquet").groups
    (tmp_path / "text.parquet").write_text("no parquet here at all")
    with pytest.raises(UserError, match="not a parquet file"):
        _ = ParquetSource(tmp_path / "text.parquet").groups
