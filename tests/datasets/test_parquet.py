"""Rows of parquet files that no training step can use are named, with their reason, before any step."""

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parcelray.benchmarks.readers.samples import SamplesReader
from parcelray.benchmarks.training_data import check_rows
from parcelray.config.data import ParquetDataConfig
from parcelray.datasets import parquet
from parcelray.datasets.parquet import SCHEMA, ParquetSource
from parcelray.datasets.source import BadRowsError
from parcelray.errors import SystemFailure, UserError

IMAGE = {"bytes": b"not decoded by a check of the structure", "path": None}
GOOD: dict[str, Any] = {
    "id": "good",
    "benchmark": "own",
    "family": "general",
    "task": "count",
    "images": [IMAGE],
    "prompt": "how many",
    "answers": ["2"],
    "metric": "exact_match",
    "scene": "",
    "metadata": "{}",
}
REGION = {"word": "circle", "box": [0.1, 0.2, 0.3, 0.4]}


def write_rows(folder: Path, *changes: dict[str, Any]) -> Path:
    """Writes rows that differ from a good one; returns the folder of the split."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([GOOD | each for each in changes], schema=SCHEMA), folder / "part.parquet")
    return folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answers": []}, "no answer"),
        ({"answers": None}, "no answer"),
        ({"answers": [None, "2"]}, "no answer"),
        ({"answers": [""]}, "no answer"),
        ({"images": []}, "no image"),
        ({"images": None}, "no image"),
        ({"prompt": None}, "no prompt"),
        ({"family": None}, "no family"),
        ({"task": None}, "no task"),
        ({"benchmark": None}, "no benchmark"),
        ({"metadata": "{"}, "its metadata is not JSON"),
        ({"metadata": '{"number": ' + "9" * 5000 + "}"}, "its metadata cannot be decoded"),
        ({"metadata": "[" * 100_000}, "its metadata cannot be decoded"),
        ({"metadata": "[1]"}, "its metadata is not a JSON object"),
        ({"metadata": '{"regions": 3}'}, "its regions are not a list with at most one entry for each of its 1 images"),
        ({"metadata": '{"regions": [[], []]}'}, "its regions are not a list with at most one entry"),
        ({"metadata": '{"regions": [[{"box": [0, 0, 1, 1]}]]}'}, "a region has no word"),
        ({"metadata": '{"regions": [[{"word": "red", "box": [0, 0]}]]}'}, "a region has no box of four numbers"),
        (
            {"metadata": '{"regions": [[{"word": "red", "box": [NaN, 0, 1, Infinity]}]]}'},
            "a region has no box of four numbers",
        ),
    ],
)
def test_a_row_that_gives_no_sample_is_named_with_its_reason(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = write_rows(tmp_path, {}, {"id": "bad"} | change)
    with pytest.raises(BadRowsError, match="1 row of the training data cannot be used") as caught:
        ParquetSource(folder).check()
    assert f": bad (row 1 of {folder.name}/part.parquet): {reason}" in str(caught.value)
    # An evaluation counts the same row as a problem and goes on.
    read = SamplesReader("own", folder).read(1)
    assert read.samples == ()
    assert [(problem.row, problem.reason.startswith(reason)) for problem in read.problems] == [("bad", True)]


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": None},
        {"metric": None, "scene": None},
        {"prompt": ""},
        {"answers": ["2", None]},
        {"images": [IMAGE, IMAGE], "metadata": '{"regions": [[]]}'},
        {"prompt": "The page says <eos> and <pad>."},
    ],
)
def test_a_row_with_all_that_a_sample_needs_is_read(tmp_path: Path, change: dict[str, Any]) -> None:
    source = ParquetSource(write_rows(tmp_path, change))
    source.check()
    sample = source.get(source.groups[0].name, 0)
    assert (sample.id, sample.metric, sample.scene) == ("good", "exact_match", "")
    assert sample.answers[0] == "2"
    assert isinstance(sample.metadata, dict)


def test_the_first_rows_and_the_number_of_all_bad_rows_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "train", *({"id": f"r{number}", "answers": []} for number in range(9)), {"id": None})
    write_rows(tmp_path / "validation", {})
    with pytest.raises(
        BadRowsError, match=r"10 rows of the training data .* r4 .*no answer; and 5 more\. Fix"
    ) as caught:
        check_rows(ParquetDataConfig(type="parquet", path=str(tmp_path)))
    assert "r5" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_rows_of_the_validation_are_checked_too(tmp_path: Path) -> None:
    write_rows(tmp_path / "train", {})
    write_rows(tmp_path / "validation", {"id": "late", "answers": []})
    with pytest.raises(BadRowsError, match=r"late \(row 0 of validation/part\.parquet\)"):
        check_rows(ParquetDataConfig(type="parquet", path=str(tmp_path)))


def test_a_row_without_id_is_named_by_its_number(tmp_path: Path) -> None:
    with pytest.raises(BadRowsError, match=r"\(no id\) \(row 2 of .*/part\.parquet\): no id"):
        ParquetSource(write_rows(tmp_path, {}, {}, {"id": None})).check()


def test_the_check_reads_no_bytes_of_images(tmp_path: Path) -> None:
    folder = write_rows(tmp_path, {}, {"images": [IMAGE, IMAGE]})
    rows = list(parquet._light_rows(folder / "part.parquet"))
    assert [row["images"] for row in rows] == [[{"path": None}], [{"path": None}, {"path": None}]]


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    rows = [GOOD | {"metadata": {"permutation": 3}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part.parquet")
    with pytest.raises(UserError, match=r"part\.parquet has a column of another type .* metadata \(string\)"):
        ParquetSource(tmp_path).check()


def _with_images(images: Any, given: pa.DataType) -> pa.Table:
    rows = pa.Table.from_pylist([GOOD | {"id": f"r{number}"} for number in range(len(images))], schema=SCHEMA)
    return rows.set_column(rows.schema.get_field_index("images"), "images", pa.array(images, given))


@pytest.mark.parametrize("given", [pa.list_(pa.binary()), pa.large_list(pa.large_binary())], ids=str)
def test_images_may_be_lists_of_binary_values(tmp_path: Path, given: pa.DataType) -> None:
    pq.write_table(_with_images([[b"one"], [b"two", None], [b"three"]], given), tmp_path / "part.parquet")
    # A second shard has the layout of the export.
    pq.write_table(pa.Table.from_pylist([GOOD], schema=SCHEMA), tmp_path / "second.parquet")
    source = ParquetSource(tmp_path)
    source.check()
    assert [source.get("images-1", index).images for index in range(3)] == [(b"one",), (b"three",), (IMAGE["bytes"],)]
    assert source.get("images-2", 0).images == (b"two", b"")


def test_an_evaluation_reads_lists_of_binary_values_too(tmp_path: Path) -> None:
    pq.write_table(_with_images([[b"one", None]], pa.list_(pa.binary())), tmp_path / "part.parquet")
    (sample,) = SamplesReader("own", tmp_path).read(0).samples
    assert sample.images == (b"one", b"")


def test_rows_without_images_in_lists_of_binary_values_are_named(tmp_path: Path) -> None:
    pq.write_table(_with_images([None, [b"one"], []], pa.list_(pa.binary())), tmp_path / "part.parquet")
    with pytest.raises(BadRowsError, match=r"r0 \(row 0 .*: no image; r2 \(row 2 .*: no image"):
        ParquetSource(tmp_path).check()


@pytest.mark.parametrize(
    ("images", "given"),
    [
        ([["a.png"]], pa.list_(pa.string())),
        ([b"image"], pa.binary()),
        ([[{"bytes": [3]}]], pa.list_(pa.struct([("bytes", pa.list_(pa.int64()))]))),
    ],
    ids=str,
)
def test_images_of_another_type_are_refused_by_the_check(tmp_path: Path, images: Any, given: pa.DataType) -> None:
    pq.write_table(_with_images(images, given), tmp_path / "part.parquet")
    with pytest.raises(UserError, match=r"part\.parquet has a column of another type .* list<binary>"):
        ParquetSource(tmp_path).check()


def test_texts_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    rows = pa.Table.from_pylist([GOOD], schema=SCHEMA)
    rows = rows.set_column(rows.schema.get_field_index("prompt"), "prompt", pa.array([b"\xff"]))
    pq.write_table(rows, tmp_path / "part.parquet")
    with pytest.raises(UserError, match=r"part\.parquet has a column of another type"):
        ParquetSource(tmp_path).check()


@pytest.mark.parametrize("read", [ParquetSource.check, lambda source: source.groups], ids=["check", "read"])
def test_a_file_with_damaged_pages_is_named(tmp_path: Path, read: Any) -> None:
    file = write_rows(tmp_path, *({"id": f"r{number}"} for number in range(100))) / "part.parquet"
    content = bytearray(file.read_bytes())
    # The pages are at the start, and the footer is at the end.
    content[4:200] = b"\xff" * 196
    file.write_bytes(content)
    with pytest.raises(SystemFailure, match=r"part\.parquet is damaged or cannot be read \([^\n]*\); write or copy"):
        read(ParquetSource(tmp_path))
