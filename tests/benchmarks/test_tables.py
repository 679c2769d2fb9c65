"""Reading of rows from every kind of file, frames from videos, and reporting of problems."""

import base64
import io
import json
import pickle
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from parcelray.benchmarks.catalog import builtin
from parcelray.benchmarks.listing import DataCheck
from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.open import open_reader
from parcelray.benchmarks.readers.base import DatasetFingerprint, Problem, chosen_rows
from parcelray.benchmarks.readers.table import TableReader
from parcelray.benchmarks.tables.images import BadCell, cell_images, image_size, video_frames, with_box
from parcelray.benchmarks.tables.types import arrow_type, fits
from parcelray.config.benchmark import BenchmarkConfig, VideoConfig
from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from tests.datasets.image_cases import REFUSED, read

from .table_data import png

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TYPES = {"name": "string", "scene": "string", "question": "string", "answers": "list<string>", "image": "image"}
_ROWS: list[dict[str, Any]] = [
    {
        "name": str(number),
        "scene": f"s{number // 2}",
        "question": f"q{number}",
        "answers": [f"a{number}", "a"],
        "image": {"bytes": png((number, 0, 0)), "path": None},
    }
    for number in range(6)
]


def _config(**changes: Any) -> BenchmarkConfig:
    columns = {
        "types": _TYPES,
        "id": ["name"],
        "images": ["image"],
        "answers": {"column": "answers", "form": "list"},
        "cluster": "scene",
    }
    return BenchmarkConfig.model_validate(
        {
            "name": "mine",
            "family": "general",
            "source": {"splits": ["test"]} | changes.pop("source", {}),
            "columns": columns | changes,
            "prompts": {"paligemma": "answer en {question}"},
            "metric": "exact_match",
        }
    )


def _reader(data: Path, **changes: Any) -> TableReader:
    reader = open_reader(_config(**changes), data=data)
    assert isinstance(reader, TableReader)
    return reader


def _parquet(file: Path, rows: list[dict[str, Any]] = _ROWS, row_group_size: int = 2) -> Path:
    schema = pa.schema(
        [
            ("name", pa.string()),
            ("scene", pa.string()),
            ("question", pa.string()),
            ("answers", pa.list_(pa.string())),
            ("image", _IMAGE),
        ]
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=row_group_size)
    return file


def _jsonl(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    lines = []
    for row in _ROWS:
        (folder / "images" / f"{row['name']}.png").write_bytes(row["image"]["bytes"])
        lines.append(json.dumps(row | {"image": f"images/{row['name']}.png"}))
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def _hugging_face(folder: Path) -> Path:
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in _ROWS]
    table = datasets.Dataset.from_dict(
        {name: [row[name] for row in _ROWS] for name in ("name", "scene", "question", "answers")} | {"image": images}
    )
    datasets.DatasetDict({"test": table, "train": table}).save_to_disk(str(folder))
    return folder


def _single_hugging_face(folder: Path) -> Path:
    datasets.load_from_disk(str(_hugging_face(folder / "all")))["test"].save_to_disk(str(folder / "one"))
    return folder / "one"


def _shards(folder: Path) -> Path:
    for number in range(2):
        _parquet(folder / "data" / f"test-0000{number}-of-00002.parquet", _ROWS[3 * number : 3 * number + 3])
    return folder


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda folder: _parquet(folder / "x.parquet"), id="a parquet file"),
        pytest.param(
            lambda folder: _parquet(folder / "test.parquet").parent, id="a folder with the split's name in it"
        ),
        pytest.param(lambda folder: _parquet(folder / "test" / "0.parquet").parent.parent, id="a folder of the split"),
        pytest.param(_shards, id="shards as on the hub"),
        pytest.param(_jsonl, id="JSON lines and an image folder"),
        pytest.param(lambda folder: _jsonl(folder) / "test.jsonl", id="a JSON-lines file"),
        pytest.param(_hugging_face, id="save_to_disk, several splits"),
        pytest.param(_single_hugging_face, id="save_to_disk, one split"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(make: Any, tmp_path: Path) -> None:
    reader = _reader(make(tmp_path / "data"))
    for each in (reader, pickle.loads(pickle.dumps(reader))):
        assert each.fingerprint().rows == 6
        assert len(each.fingerprint().ids) == 64
        samples = [sample for row in each.order() for sample in each.read(row).samples]
        assert [sample.prompt for sample in samples] == [f"answer en q{number}" for number in range(6)]
        assert [sample.answers for sample in samples] == [(f"a{number}", "a") for number in range(6)]
        assert [np.asarray(Image.open(io.BytesIO(sample.images[0])))[0, 0, 0] for sample in samples] == list(range(6))
        assert [sample.scene for sample in samples] == ["s0", "s0", "s1", "s1", "s2", "s2"]
    assert (
        reader.fingerprint() == _reader(make(tmp_path / "again")).fingerprint()
        or "save_to_disk" in str(make)
        or reader.fingerprint().ids == _reader(tmp_path / "data").fingerprint().ids
    )


def test_changed_data_have_another_fingerprint(tmp_path: Path) -> None:
    first = _reader(_parquet(tmp_path / "a.parquet")).fingerprint()
    assert _reader(_parquet(tmp_path / "b.parquet", _ROWS[:5])).fingerprint().ids != first.ids
    changed = [*_ROWS[:5], _ROWS[5] | {"question": "another"}]
    second = _reader(_parquet(tmp_path / "a.parquet", changed)).fingerprint()
    assert second.ids == first.ids
    assert second.revision != first.revision


def test_a_limit_takes_whole_clusters(tmp_path: Path) -> None:
    reader = _reader(_parquet(tmp_path / "x.parquet"))
    some, more = chosen_rows(reader, 3), chosen_rows(reader, 5)
    assert len(some) == 4
    assert set(some) <= set(more)
    assert {row // 2 for row in some} == {row // 2 for row in some if row % 2}
    assert list(chosen_rows(reader, None)) == list(range(6))


def test_only_rows_that_pass_the_filter_are_read(tmp_path: Path) -> None:
    reader = _reader(_parquet(tmp_path / "x.parquet"), keep={"scene": ["s1"]})
    assert [reader.read(row).samples[0].id for row in reader.order()] == ["2", "3"]
    with pytest.raises(UserError, match="no row of the data passes the filter"):
        _reader(_parquet(tmp_path / "x.parquet"), keep={"scene": ["s9"]}).fingerprint()


def test_problems_of_rows_are_reported(tmp_path: Path) -> None:
    rows = [
        _ROWS[0] | {"answers": []},
        _ROWS[1] | {"image": None},
        _ROWS[2] | {"question": None},
        _ROWS[3] | {"image": {"bytes": None, "path": "gone.png"}},
        _ROWS[4],
    ]
    reader = _reader(_parquet(tmp_path / "x.parquet", rows))
    found = [reader.read(row) for row in reader.order()]
    reasons = [(problem.row, problem.reason) for each in found for problem in each.problems]
    assert reasons == [
        ("0", "no answer"),
        ("1", "no image"),
        ("2", "the column question, which the prompt uses, is empty"),
        ("3", "the file 'gone.png' does not exist"),
    ]
    assert [len(each.samples) for each in found] == [0, 0, 0, 0, 1]


_OPTION_TYPES = {"name": "string", "question": "string", "image": "image"}
_OPTIONS_PROMPT = "{question}|{options_lines}|{options_inline}|{options_tabs}"


def _choice_reader(folder: Path, rows: list[dict[str, Any]], prompt: str = _OPTIONS_PROMPT, **columns: Any) -> Any:
    image = {"bytes": png(), "path": None}
    table = [{"name": str(number), "question": "q", "image": image} | row for number, row in enumerate(rows)]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), folder / "test.parquet")
    types = _OPTION_TYPES | {name: "string" for name in rows[0] if name not in _OPTION_TYPES}
    config = {
        "name": "mine",
        "family": "general",
        "source": {"splits": ["test"]},
        "columns": {"types": types, "id": ["name"], "images": ["image"]} | columns,
        "prompts": {"paligemma": prompt},
        "metric": "multiple_choice:option",
    }
    return open_reader(BenchmarkConfig.model_validate(config), data=folder)


@pytest.mark.parametrize("empty", [None, "", " ", "nan"])
@pytest.mark.parametrize("as_list", [True, False])
def test_letters_stay_with_their_columns(tmp_path: Path, empty: str | None, as_list: bool) -> None:
    texts: list[Any] = ["x", None if as_list and empty == "nan" else empty, "y", "z", empty and " "]
    row = {"options": texts} if as_list else dict(zip("ABCDE", texts, strict=True))
    names = ["options"] if as_list else list("ABCDE")
    for form, answer in (("text", "y"), ("letter", "C"), ("choice_text", "2"), ("choice_letter", "2")):
        target = {"answer": answer}
        reader = _choice_reader(
            tmp_path / form, [row | target], choices=names, answers={"column": "answer", "form": form}
        )
        (sample,) = reader.read(0).samples
        assert sample.prompt == "q|A. x\nC. y\nD. z|(A) x, (C) y, (D) z|x \t y \t z"
        assert [choice.strip() for choice in sample.metadata["choices"]] == ["x", "", "y", "z"]
        by_text = form in ("text", "choice_text")
        assert sample.answers == (("y",) if by_text else ("C",))
        assert sample.metadata["candidates"] == (["x", "y", "z"] if by_text else ["A", "C", "D"])
        assert metric("multiple_choice")(["C", "D", "y"], [sample] * 3).values == (1, 0, 1)


def test_choices_that_are_letters_are_told_apart_by_position(tmp_path: Path) -> None:
    reader = _choice_reader(
        tmp_path,
        [{"options": ["D", "A", "E", "B"], "answer": "0"}],
        choices=["options"],
        answers={"column": "answer", "form": "choice_text"},
    )
    (sample,) = reader.read(0).samples
    assert sample.answers == ("D",)
    assert metric("multiple_choice")(["A", "D"], [sample] * 2).values == (1, 0)
    assert metric("exact_match:raw")(["A", "D"], [sample] * 2).values == (0, 1)


def test_choices_without_a_letter_are_one_problem(tmp_path: Path) -> None:
    many = [f"n{number}" for number in range(27)]
    rows = [
        {"options": many, "answer": "26"},
        {"options": ["x", "", "y"], "answer": "1"},
        {"options": ["x", "", "y"], "answer": "3"},
        {"options": many[:26], "answer": "25"},
    ]
    for form, prompt in (("choice_letter", "{question}"), ("choice_text", _OPTIONS_PROMPT)):
        answers = {"column": "answer", "form": form}
        reader = _choice_reader(tmp_path / form, rows, prompt, choices=["options"], answers=answers)
        found = [reader.read(row) for row in range(4)]
        assert [problem.reason for each in found for problem in each.problems] == [
            "27 choices; the letters A to Z name at most 26",
            "the correct choice, 1, is empty",
            "3 is not the index of a choice; there are 3",
        ]
        assert found[3].samples[0].answers == (("Z",) if form == "choice_letter" else ("n25",))
    # Neither the prompt nor the answer needs letters.
    answers = {"column": "answer", "form": "choice_text"}
    reader = _choice_reader(tmp_path / "text", rows, "{question} {options_tabs}", choices=["options"], answers=answers)
    assert reader.read(0).samples[0].answers == ("n26",)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("b", None),
        ("E", "'E' is not the letter of a choice; legal: A, B, D"),
        ("C", "'C' is not the letter of a choice; legal: A, B, D"),
        ("AB", "'AB' is not the letter of a choice; legal: A, B, D"),
        ("", "no answer"),
    ],
)
def test_a_letter_must_name_a_choice(answer: str, reason: str | None, tmp_path: Path) -> None:
    row = {"options": ["x", "y", "", "z"], "answer": answer}
    reader = _choice_reader(tmp_path, [row], choices=["options"], answers={"column": "answer", "form": "letter"})
    found = reader.read(0)
    assert [problem.reason for problem in found.problems] == ([] if reason is None else [reason])
    assert [sample.answers for sample in found.samples] == ([("B",)] if reason is None else [])


@pytest.mark.parametrize("hint", [None, "", "nan", float("nan"), "NaN as text"])
def test_nan_is_an_empty_cell(tmp_path: Path, hint: str | float | None) -> None:
    reader = _choice_reader(
        tmp_path,
        [{"hint": hint, "answer": "a"}],
        "{hint} {question}",
        answers={"column": "answer"},
        empty={"hint": ""},
    )
    assert reader.read(0).samples[0].prompt == ("NaN as text q" if hint == "NaN as text" else "q")


def test_missing_columns_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"name": ["0"], "Question": ["q"]}), file)
    with pytest.raises(
        UserError,
        match="mine: the data of split test lack the columns answers, image, question, scene; they have name, Question",
    ):
        _reader(file).fingerprint()


def test_ids_must_be_unique(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than one row has the id '1'; name more columns"):
        _reader(_parquet(tmp_path / "x.parquet", [_ROWS[1], _ROWS[1]])).fingerprint()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "does not exist"),
        (lambda folder: _parquet(folder / "x.txt"), "neither a parquet nor a JSON-lines file"),
        (
            lambda folder: _parquet(folder / "validation.parquet").parent,
            r"has no test-\*.parquet, test.parquet or test.jsonl; it has validation.parquet",
        ),
        (lambda folder: None, "is not on the Hugging Face hub"),
    ],
)
def test_missing_data_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_reader(_config(), data=make(tmp_path)).fingerprint()


def test_broken_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not all of these are parquet files"):
        _reader(tmp_path / "x.parquet").fingerprint()
    (tmp_path / "x.jsonl").write_text('{"name": 1}\n{"name": \n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        _reader(tmp_path / "x.jsonl").fingerprint()
    (tmp_path / "x.jsonl").write_bytes('{"name": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="line 1 is not encoded as UTF-8; convert the file"):
        _reader(tmp_path / "x.jsonl").fingerprint()
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "test.csv").write_text("name,scene\n1,2\n1,2,3,4\n")
    with pytest.raises(UserError, match=r"csv .* cannot be loaded: .*Expected 2 fields in line 3, saw 4"):
        _reader(tmp_path / "csv").fingerprint()


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000])
def test_lines_that_the_parser_refuses_are_reported(value: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"name": 1}\n{"name": ' + value + "}\n")
    with pytest.raises(UserError, match="line 2 cannot be read"):
        _reader(tmp_path / "x.jsonl").fingerprint()


def test_a_file_without_rows_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(UserError, match="they have no columns"):
        _reader(tmp_path / "x.jsonl").fingerprint()


def test_shards_with_other_columns_are_refused(tmp_path: Path) -> None:
    _shards(tmp_path)
    second = tmp_path / "data" / "test-00001-of-00002.parquet"
    pq.write_table(pq.read_table(second).drop_columns(["scene"]), second)
    with pytest.raises(UserError, match="do not have the same columns: only one of them has scene"):
        _reader(tmp_path).fingerprint()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answers": "red"}, "the column answers has 'red', but its declared type is list<string>"),
        ({"answers": [["red"]]}, "the column answers has [['red']], but its declared type is list<string>"),
        ({"answers": {"a": 1}}, "the column answers has {'a': 1}, but its declared type is list<string>"),
        ({"question": ["what"]}, "the column question has ['what'], but its declared type is string"),
        ({"question": True}, "the column question has True, but its declared type is string"),
        ({"scene": ["s0"]}, "the column scene has ['s0'], but its declared type is string"),
        ({"image": {"bytes": "text"}}, "the bytes of an image are 'text'; give bytes, or numbers from 0 to 255"),
        ({"image": {"bytes": [1, 300]}}, "the bytes of an image are [1, 300]; give bytes, or numbers from 0 to 255"),
        ({"image": {"bytes": 5}}, "the bytes of an image are 5; give bytes, or numbers from 0 to 255"),
    ],
)
def test_cells_of_another_type_than_declared_are_problems(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    rows = [row | {"image": "a.png"} for row in _ROWS[:2]]
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in (rows[0] | change, rows[1])))
    reader = _reader(tmp_path)
    first, second = (reader.read(row) for row in reader.order())
    assert [problem.reason for problem in first.problems] == [reason]
    assert len(second.samples) == 1


def _rows_reader(folder: Path, change: dict[str, Any], **columns: Any) -> TableReader:
    """Opens one row of JSON lines, with changed cells."""
    (folder / "a.png").write_bytes(png())
    (folder / "test.jsonl").write_text(json.dumps(_ROWS[0] | {"image": "a.png"} | change))
    return _reader(folder, **columns)


@pytest.mark.parametrize("options", [5, "5", "{'a': 1}", "[" * 100_000], ids=["number", "digit", "mapping", "deep"])
def test_choices_that_are_no_list_are_a_problem(options: Any, tmp_path: Path) -> None:
    types = _TYPES | {"options": "string", "answers": "string"}
    answers = {"column": "answers", "form": "letter"}
    change = {"options": options, "answers": "A"}
    reader = _rows_reader(tmp_path, change, types=types, choices=["options"], answers=answers)
    (problem,) = reader.read(0).problems
    assert problem.reason.endswith("is not a list")


def test_a_box_with_an_empty_number_is_a_problem(tmp_path: Path) -> None:
    types = _TYPES | {"bbox": "list<float>"}
    reader = _rows_reader(tmp_path, {"bbox": [None, 1, 2, 3]}, types=types, box={"column": "bbox"})
    assert [problem.reason for problem in reader.read(0).problems] == [
        "[None, 1.0, 2.0, 3.0] does not consist of numbers"
    ]


def test_a_mask_without_a_size_has_the_size_of_its_image(tmp_path: Path) -> None:
    types = _TYPES | {"mask": "struct<size: list<int64>, counts: string>"}
    (sample,) = _rows_reader(tmp_path, {"mask": {"counts": "1"}}, types=types, mask="mask").read(0).samples
    assert sample.metadata["mask"] == {"size": [24, 32], "counts": "1"}


@pytest.mark.parametrize("entries", [[None], [{}]])
def test_an_empty_entry_of_each_is_a_problem(entries: list[Any], tmp_path: Path) -> None:
    types = _TYPES | {"pairs": "list<struct<question: string, answer: string>>"}
    change = {"pairs": [*entries, {"question": "q", "answer": "a"}]}
    found = _rows_reader(tmp_path, change, types=types, each=["pairs"], answers={"column": "answer"}).read(0)
    assert [problem.row for problem in found.problems] == ["0#0"]
    assert [sample.id for sample in found.samples] == ["0#1"]


def test_a_bad_cell_of_a_filter_is_reported_with_its_row(tmp_path: Path) -> None:
    reader = _rows_reader(tmp_path, {"scene": ["s0"]}, keep={"scene": ["s0"]})
    with pytest.raises(
        UserError, match=r"mine: in row 0, the column scene has \['s0'\], but its declared type is string"
    ):
        reader.fingerprint()


def test_filters_compare_cells_in_their_declared_type(tmp_path: Path) -> None:
    assert _rows_reader(tmp_path, {"scene": 7}, keep={"scene": ["7"]}).fingerprint().rows == 1


@pytest.mark.parametrize(
    ("kind", "cell", "expected"),
    [
        ("int64", "1", 1),
        ("string", 1, "1"),
        ("string", None, None),
        ("list<string>", ["a", 1], ["a", "1"]),
        ("bool", "false", False),
        ("double", 1, 1.0),
        ("struct<a: int64, b: string>", {"a": " -2 "}, {"a": -2, "b": None}),
    ],
)
def test_metadata_has_its_declared_type(kind: str, cell: Any, expected: Any, tmp_path: Path) -> None:
    reader = _rows_reader(tmp_path, {"extra": cell}, types=_TYPES | {"extra": kind}, metadata={"extra": "extra"})
    (sample,) = reader.read(0).samples
    assert sample.metadata["extra"] == expected
    assert type(sample.metadata["extra"]) is type(expected)


def test_metadata_of_another_type_is_a_problem(tmp_path: Path) -> None:
    reader = _rows_reader(tmp_path, {"extra": "x"}, types=_TYPES | {"extra": "int64"}, metadata={"extra": "extra"})
    (problem,) = reader.read(0).problems
    assert problem.reason == "the column extra has 'x', but its declared type is int64"


def test_the_index_of_mmbench_may_be_text(tmp_path: Path) -> None:
    config = builtin()["mmbench_en_dev"]
    (tmp_path / "a.png").write_bytes(png())
    row = {name: "x" for name in config.columns.types} if config.columns is not None else {}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row | {"index": "1", "answer": "A", "image": "a.png"}))
    (sample,) = open_reader(config, family="llava", data=tmp_path).read(0).samples
    assert metric("mmbench:circular")(["A"], [sample]).values == (1,)


@pytest.mark.parametrize(
    ("kind", "cell"),
    [("int64", "1" * 5000), ("double", 10**400), ("string", 1.5)],
    ids=["too many digits", "too large", "no whole number"],
)
def test_cells_without_a_value_in_their_type_do_not_fit(kind: str, cell: Any) -> None:
    assert not fits(cell, arrow_type(kind))


def test_images_in_json_may_be_lists_of_numbers(tmp_path: Path) -> None:
    assert cell_images({"bytes": list(png())}, tmp_path) == [png()]


def test_texts_of_the_data_are_not_read_as_markup() -> None:
    texts = ["[INST] what [/INST] [a, b, c, d]", "[/b]", "[red]"]
    example = Sample("0", "mine", "general", "mine", (), texts[0], (texts[1],), "exact_match", "s", {})
    problems = (Problem("0", texts[2]),)
    check = DataCheck("mine", DatasetFingerprint("files:1", 1, "0" * 64), 1, 1, 1, problems, example)
    output = io.StringIO()
    Console(file=output, width=120).print(check.to_rich())
    assert all(text in output.getvalue() for text in texts)


@pytest.mark.parametrize("write", ["parquet", "save_to_disk"])
def test_classes_are_read_by_name(write: str, tmp_path: Path) -> None:
    features = {name: datasets.Value("string") for name in ("name", "scene", "question")}
    features |= {"answers": datasets.ClassLabel(names=["red", "blue"]), "image": datasets.Image()}
    rows = {name: ["1", "2"] for name in ("name", "scene", "question")} | {"answers": [1, 0]}
    images = [{"bytes": png(), "path": None}] * 2
    table = datasets.Dataset.from_dict(rows | {"image": images}, features=datasets.Features(features))
    if write == "parquet":
        table.to_parquet(tmp_path / "test.parquet")
    else:
        table.save_to_disk(str(tmp_path))
    types = _TYPES | {"answers": "string"}
    reader = _reader(tmp_path, types=types, answers={"column": "answers"})
    assert [reader.read(row).samples[0].answers for row in reader.order()] == [("blue",), ("red",)]


def test_large_lists_of_images_stay_encoded(tmp_path: Path) -> None:
    features = {name: datasets.Value("string") for name in ("name", "scene", "question", "answers")}
    features["image"] = datasets.LargeList(datasets.Image())
    rows: dict[str, Any] = {name: ["1"] for name in ("name", "scene", "question", "answers")}
    rows["image"] = [[{"bytes": png(), "path": None}] * 2]
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(tmp_path))
    types = _TYPES | {"answers": "string", "image": "list<image>"}
    reader = _reader(tmp_path, types=types, answers={"column": "answers"})
    assert reader.read(0).samples[0].images == (png(), png())


def test_an_image_folder_with_a_folder_of_the_split(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.png").write_bytes(png())
    row = {name: _ROWS[0][name] for name in ("name", "scene", "question", "answers")} | {"image": "a.png"}
    (tmp_path / "test" / "metadata.jsonl").write_text("\ufeff" + json.dumps(row), encoding="utf-8")
    assert _reader(tmp_path).read(0).samples[0].images == (png(),)


def test_paths_must_stay_below_the_data(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "data").mkdir()
    for path in ("../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png"):
        with pytest.raises(BadCell, match="leads out of the data folder"):
            cell_images(path, tmp_path / "data")


def test_images_may_be_links_as_in_a_hugging_face_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "3f").write_bytes(png())
    (tmp_path / "snapshots" / "main").mkdir(parents=True)
    (tmp_path / "snapshots" / "main" / "a.png").symlink_to(Path("../../blobs/3f"))
    assert cell_images("a.png", tmp_path / "snapshots" / "main") == [png()]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("folder", "the file 'folder' cannot be read (Is a directory)"),
        ("a\0b.png", r"the file 'a\x00b.png' does not exist"),
        ("x" * 400, f"the file '{'x' * 59}... does not exist"),
        (base64.b64encode(png() * 100).decode(), "does not exist"),
    ],
)
def test_cells_that_are_no_path_are_problems_of_their_row(cell: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadCell) as caught:
        cell_images(cell, tmp_path)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 200


def test_cells_hold_images_in_several_forms(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    assert cell_images(
        [b"x", {"bytes": b"y", "path": None}, {"bytes": None, "path": "a.png"}, "a.png", None], tmp_path
    ) == [b"x", b"y", b"A", b"A"]
    assert cell_images(None, tmp_path) == []
    with pytest.raises(BadCell, match="a cell of type int"):
        cell_images(3, tmp_path)


def test_a_box_is_drawn_in_red() -> None:
    pixels = np.asarray(Image.open(io.BytesIO(with_box(png((0, 0, 0), (11, 11)), (0.2, 0.1, 0.8, 0.9)))))
    red = np.argwhere(pixels[:, :, 0] == 255)
    assert (red.min(axis=0).tolist(), red.max(axis=0).tolist()) == ([2, 1], [8, 9])
    assert pixels[5, 5, 0] == 0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("exif_orientation_6.jpg", (48, 96)),
        ("one_pixel_wide.png", (1, 64)),
        ("wide_60000x1.png", (60_000, 1)),
        ("rgb_transparent_color.png", (64, 64)),
        ("grey_16_bit.png", (256, 4)),
    ],
)
def test_sizes_and_boxes_are_those_of_the_decoded_image(name: str, size: tuple[int, int]) -> None:
    data = read(name)
    assert image_size(data) == size
    marked, plain = decode_image(with_box(data, (0.0, 0.0, 1.0, 1.0))), decode_image(data)
    assert marked.size == plain.size == size
    assert marked.getpixel((0, 0)) == marked.getpixel((size[0] - 1, size[1] - 1)) == (255, 0, 0)
    if min(size) > 2:
        assert np.array_equal(np.asarray(marked)[1:-1, 1:-1], np.asarray(plain)[1:-1, 1:-1])


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_that_cannot_be_used_is_a_problem_of_its_row(name: str) -> None:
    with pytest.raises(BadCell, match=r"cannot be decoded|too many pixels"):
        with_box(read(name), (0.0, 0.0, 1.0, 1.0))
    if name != "truncated.jpg":  # its header is valid
        with pytest.raises(BadCell, match=r"cannot be decoded|too many pixels"):
            image_size(read(name))


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A folder with a video of 30 frames at 10 frames per second, with increasing brightness."""
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * number, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return tmp_path


def _brightness(frames: tuple[bytes, ...]) -> list[int]:
    return [round(float(np.asarray(Image.open(io.BytesIO(frame))).mean()) / 8) for frame in frames]


@pytest.mark.parametrize(
    ("config", "segment", "expected"),
    [
        ({"frames": 4, "stride": 5}, None, [0, 5, 10, 15]),
        ({"frames": 4, "stride": 15}, None, [0, 15, 0, 15]),
        ({"frames": 3, "stride": 2}, (1.0, 3.0), [10, 12, 14]),
        ({"frames": 3, "stride": 2}, (1.0, 1.25), [10, 12, 10]),
    ],
)
def test_frames_have_a_fixed_stride_and_repeat(
    video: Path, config: dict[str, int], segment: tuple[float, float] | None, expected: list[int]
) -> None:
    frames = video_frames(video, "v.mp4", VideoConfig(path="", **config), segment)
    assert _brightness(frames) == pytest.approx(expected, abs=1)


def test_videos_that_cannot_be_read_are_reported(video: Path) -> None:
    config = VideoConfig(path="", frames=2, stride=1)
    (video / "broken.mp4").write_bytes(b"no video")
    (video / "empty").mkdir()
    for path, reason in (
        ("none.mp4", "the file 'none.mp4' does not exist"),
        ("broken.mp4", "cannot be decoded"),
        ("empty", "no frames in 'empty'"),
    ):
        with pytest.raises(BadCell, match=reason):
            video_frames(video, path, config)
