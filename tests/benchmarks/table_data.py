"""Writes small files with the exact schema of a benchmark split, four rows each."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from parcelray.benchmarks.tables.types import arrow_type, split_fields
from parcelray.config.benchmark import BenchmarkConfig, ColumnsConfig, TableSource, of_family

ROWS = 4
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_CHOICES = ["red", "blue", "green", "white"]
_ANNOTATORS = 10


def write_benchmark(config: BenchmarkConfig, folder: Path, answer: str | None = None) -> list[dict[str, Any]]:
    """Writes the files of all splits below a folder and returns their rows.

    Args:
        config: the benchmark.
        folder: where to write.
        answer: right answer of every question, for answers in words; None: one that fits the benchmark's metric.
    """
    source, columns = config.source, config.columns
    assert isinstance(source, TableSource)
    assert columns is not None
    schema = pa.schema([(name, arrow_type(kind)) for name, kind in columns.types.items()])
    base = folder / source.config if source.config else folder
    base.mkdir(parents=True, exist_ok=True)
    metric = next(iter(config.metrics()), "")
    written = []
    for split in source.splits:
        rows = [
            {name: _value(columns, name, number, metric, answer) for name in columns.types} for number in range(ROWS)
        ]
        written += rows
        for row in rows:
            _write_files(columns, row, folder, base)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), base / f"{split}-00000-of-00001.parquet")
    if columns.join is not None:
        _write_joined(columns, folder)
    return written


def png(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (32, 24)) -> bytes:
    """Returns an image of one colour as PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


def _value(columns: ColumnsConfig, name: str, number: int, metric: str, answer: str | None) -> Any:
    kind = columns.types[name]
    if name in columns.keep:
        return columns.keep[name][number // 2 % len(columns.keep[name])]
    if metric.startswith("mme") and name == "question_id":
        return f"image {number // 2}"
    if name == "language":
        return "de"
    if name in columns.choices:
        if len(columns.choices) > 1:
            return _CHOICES[columns.choices.index(name)]
        return _CHOICES if kind.startswith("list") else str(_CHOICES)
    for box in (columns.box, columns.draw_box):
        if box is not None and name == box.column:
            return [2.0, 3.0, 10.0, 13.0] if box.unit == "pixels" else [0.1, 0.1, 0.5, 0.6]
    if name == columns.mask:
        return [2.0, 3.0, 12.0, 3.0, 12.0, 16.0, 2.0, 16.0]
    if columns.answers is not None and name == columns.answers.column and name not in columns.each:
        return _answer(columns, kind, number, answer or _fitting_answer(metric, number))
    if columns.video is not None and columns.video.segment and name in columns.video.segment:
        return [0.0, 1.0]
    return _plain(kind, name, number)


def _answer(columns: ColumnsConfig, kind: str, number: int, answer: str) -> Any:
    assert columns.answers is not None
    match of_family(columns.answers.form, "llava"):
        case "list":
            return [answer, f"two {answer}"] if answer.endswith("birds") else [answer] * _ANNOTATORS
        case "records":
            return [{"answer": answer, "answer_confidence": "yes", "answer_id": 1}] * _ANNOTATORS
        case "literal":
            return str([answer] * _ANNOTATORS)
        case "truth":
            return number % 2 == 0
        case "choice_text" | "choice_letter":
            return 1 if kind.startswith("int") else "1"
        case "option_text" | "option_letter":
            return _CHOICES[1]
    return 2 if kind.startswith("int") else answer


def _fitting_answer(metric: str, number: int) -> str:
    if metric.startswith("cider"):
        return f"{_CHOICES[number]} birds"
    if metric.startswith(("mme", "pope")):
        return ("yes", "no")[number % 2]
    answers = {"mmbench": "B", "multiple_choice": "B", "mmmu": "B", "relaxed_accuracy": "2.5", "nlvr2": "True"}
    return answers.get(metric.partition(":")[0], "red")


def _plain(kind: str, name: str, number: int) -> Any:
    if kind in ("image", "struct<bytes: binary, path: string>"):
        return {"bytes": png((10 * number, 100, 50)), "path": f"{number}.png"}
    if kind.startswith("list<struct<"):
        fields = [part.split(":", 1) for part in split_fields(kind[len("list<struct<") : -2])]
        return [{key.strip(): _inner(key.strip(), inner.strip(), entry) for key, inner in fields} for entry in range(2)]
    if kind.startswith("list<"):
        return [_plain(kind[5:-1], name, entry) for entry in range(2)]
    if kind.startswith("struct<"):
        return {
            part.split(":", 1)[0].strip(): f"{part.split(':')[0].strip()}-{number}" for part in split_fields(kind[7:-1])
        }
    if kind == "bool":
        return True
    return (
        f"{name}-{number}.png"
        if name == "filename"
        else number
        if kind.startswith("int")
        else float(number)
        if kind in ("float", "double")
        else f"{name} {number}"
    )


def _inner(name: str, kind: str, entry: int) -> Any:
    if kind.startswith("list"):
        return []
    return {"bool": bool(entry), "string": "2" if name == "answer" else f"{name} {entry}"}.get(kind, entry)


def _write_files(columns: ColumnsConfig, row: dict[str, Any], folder: Path, base: Path) -> None:
    for name in columns.images:
        if columns.types[name] == "string":
            (base / row[name]).write_bytes(png())
    if columns.video is not None:
        frames = folder / columns.video.path.format_map(row)
        frames.mkdir(parents=True, exist_ok=True)
        for number in range(40):
            (frames / f"{number:03d}.png").write_bytes(png((6 * number, 0, 0), (8, 8)))


def _write_joined(columns: ColumnsConfig, folder: Path) -> None:
    join = columns.join
    assert join is not None
    rows = [{join.key: f"{join.column} {number}", join.image: {"bytes": png(), "path": None}} for number in range(ROWS)]
    (folder / join.config).mkdir(exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=pa.schema([(join.key, pa.string()), (join.image, _IMAGE)])),
        folder / join.config / "testdev-00000-of-00001.parquet",
    )
