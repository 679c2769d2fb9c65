"""Writes small files with the exact schema of a benchmark split, four rows each."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from parcelray.benchmarks.tables.types import arrow_type, split_fields
from parcelray.config.benchmark import BenchmarkConfig, ColumnsConfig, TableSource

ROWS = 4
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_CHOICES = ["red", "blue", "green", "white"]


def write_benchmark(config: BenchmarkConfig, folder: Path) -> int:
    """Writes the files of all splits below a folder and returns their number of rows."""
    source, columns = config.source, config.columns
    assert isinstance(source, TableSource)
    assert columns is not None
    schema = pa.schema([(name, arrow_type(kind)) for name, kind in columns.types.items()])
    base = folder / source.config if source.config else folder
    base.mkdir(parents=True, exist_ok=True)
    for split in source.splits:
        rows = [
            {name: _value(columns, name, number, config.metric or "") for name in columns.types}
            for number in range(ROWS)
        ]
        for row in rows:
            _write_files(columns, row, folder, base)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), base / f"{split}-00000-of-00001.parquet")
    if columns.join is not None:
        _write_joined(columns, folder)
    return ROWS * len(source.splits)


def png(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (32, 24)) -> bytes:
    """Returns an image of one colour as PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


def _value(columns: ColumnsConfig, name: str, number: int, metric: str) -> Any:
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
            return [2.0, 3.0, 10.0, 12.0] if box.unit == "pixels" else [0.1, 0.1, 0.5, 0.6]
    if name == columns.mask:
        return [2.0, 3.0, 12.0, 3.0, 12.0, 15.0, 2.0, 15.0]
    if columns.answers is not None and name == columns.answers.column and name not in columns.each:
        return _answer(columns, kind, metric, number)
    if columns.video is not None and columns.video.segment and name in columns.video.segment:
        return [0.0, 1.0]
    return _plain(kind, name, number)


def _answer(columns: ColumnsConfig, kind: str, metric: str, number: int) -> Any:
    assert columns.answers is not None
    match columns.answers.form:
        case "list":
            return (
                [f"{_CHOICES[number]} birds", f"two {_CHOICES[number]} birds"] if "cider" in metric else ["red", "red"]
            )
        case "records":
            return [{"answer": "red", "answer_confidence": "yes", "answer_id": 1}] * 4
        case "literal":
            return "['red', 'red', 'blue']"
        case "truth":
            return True
        case "choice_text" | "choice_letter":
            return 1 if kind.startswith("int") else "1"
    if kind.startswith("int"):
        return 2
    if "cider" in metric:
        return f"{_CHOICES[number]} birds"
    return {"mme": "yes", "pop": "yes", "mmb": "B", "mul": "B", "mmm": "B", "rel": "2.5"}.get(metric[:3], "red")


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
