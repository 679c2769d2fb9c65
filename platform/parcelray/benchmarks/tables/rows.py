"""Finds and reads tables row by row: parquet files, JSON lines, and Hugging Face data sets."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from parcelray.config.benchmark import TableSource
from parcelray.errors import UserError

Row = dict[str, Any]
_FOOTER_BYTES = 65536
_GROUPS_KEPT = 2


class Rows(Protocol):
    """One split of a table. Instances are picklable: a pickle holds only the location of the data."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""

    @property
    def folder(self) -> Path:
        """Folder that paths in cells are relative to."""

    @property
    def revision(self) -> str:
        """Revision of the data: a commit of the hub, or a digest of the files."""

    def __len__(self) -> int:
        """Number of rows."""

    def row(self, index: int) -> Row:
        """Returns one row. Images stay encoded: bytes, {"bytes", "path"}, or a path."""

    def column(self, name: str) -> list[Any]:
        """Returns one column of all rows, without reading the other columns."""


@dataclass(frozen=True)
class ParquetRows:
    """Parquet shards in the order of their names. Each process caches the row groups that it read last."""

    files: tuple[Path, ...]

    @cached_property
    def columns(self) -> tuple[str, ...]:
        first, *others = self._open
        for file, opened in zip(self.files[1:], others, strict=True):
            differing = sorted(set(first.schema_arrow.names) ^ set(opened.schema_arrow.names))
            if differing:
                raise UserError(
                    f"{file} and {self.files[0]} do not have the same columns: only one of them has"
                    f" {', '.join(differing)}; give the shards of one split."
                )
        return tuple(first.schema_arrow.names)

    @property
    def folder(self) -> Path:
        return self.files[0].parent

    @cached_property
    def revision(self) -> str:
        """Digest of the shards' names, sizes and footers (offsets and statistics of every column chunk)."""
        digest = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size
            with file.open("rb") as opened:
                opened.seek(max(0, size - _FOOTER_BYTES))
                digest.update(f"{file.name} {size} ".encode() + opened.read())
        return "files:" + digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self._groups[-1][3] if self._groups else 0

    def row(self, index: int) -> Row:
        for file, group, start, end in self._groups:
            if start <= index < end:
                row: Row = self._group(file, group).slice(index - start, 1).to_pylist()[0]
                return row | {name: _label(row[name], names) for name, names in self._labels.items()}
        raise IndexError(f"row {index} is out of range for {len(self)} rows")

    def column(self, name: str) -> list[Any]:
        values = [value for file in self.files for value in pq.read_table(file, columns=[name])[name].to_pylist()]
        return [_label(value, self._labels[name]) for value in values] if name in self._labels else values

    @cached_property
    def _labels(self) -> dict[str, list[str]]:
        """Names of the classes of each `ClassLabel` column, which the `datasets` library stores beside its numbers."""
        stored = (self._open[0].schema_arrow.metadata or {}).get(b"huggingface")
        features = json.loads(stored).get("info", {}).get("features", {}) if stored else {}
        return {name: each["names"] for name, each in features.items() if each.get("_type") == "ClassLabel"}

    @cached_property
    def _open(self) -> list[pq.ParquetFile]:
        try:
            return [pq.ParquetFile(file, memory_map=True) for file in self.files]
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{', '.join(map(str, self.files[:3]))}: not all of these are parquet files ({error}); download the"
                " data again."
            ) from None

    @cached_property
    def _groups(self) -> list[tuple[int, int, int, int]]:
        """File index, row group index, first row and end row of every row group."""
        groups, start = [], 0
        for number, file in enumerate(self._open):
            for group in range(file.metadata.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                groups.append((number, group, start, end))
                start = end
        return groups

    @cached_property
    def _kept(self) -> OrderedDict[tuple[int, int], pa.Table]:
        return OrderedDict()

    def _group(self, file: int, group: int) -> pa.Table:
        kept = self._kept
        if (file, group) not in kept:
            kept[file, group] = self._open[file].read_row_group(group)
            if len(kept) > _GROUPS_KEPT:
                kept.popitem(last=False)
        kept.move_to_end((file, group))
        return kept[file, group]

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}


@dataclass(frozen=True)
class JsonlRows:
    """A file with one JSON object per line. Images are paths relative to its folder."""

    file: Path

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, row in self._rows for name in row))

    @property
    def folder(self) -> Path:
        return self.file.parent

    @cached_property
    def revision(self) -> str:
        """Digest of the file."""
        with self.file.open("rb") as opened:
            return "files:" + hashlib.file_digest(opened, "sha256").hexdigest()[:16]

    @property
    def line_numbers(self) -> Sequence[int]:
        """Number of each row's line, from 1; blank lines are no rows."""
        return [number for number, _ in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        _, row = self._rows[index]
        return {name: row.get(name) for name in self.columns}

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for _, row in self._rows]

    @cached_property
    def _rows(self) -> list[tuple[int, Row]]:
        rows = []
        with self.file.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                if not line.strip():
                    continue
                try:
                    # A byte order mark may precede the first line.
                    row = json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError:
                    raise UserError(
                        f"{self.file}: line {number} is not encoded as UTF-8; convert the file, for example with iconv."
                    ) from None
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{self.file}: line {number} is not JSON ({error.msg}); write one object per line."
                    ) from None
                except (ValueError, RecursionError) as error:
                    # The parser limits the digits of integers, and the depth of lists and objects.
                    raise UserError(
                        f"{self.file}: line {number} cannot be read ({error}); shorten its integers, or nest its lists"
                        " and objects less deeply."
                    ) from None
                if not isinstance(row, dict):
                    raise UserError(f"{self.file}: line {number} is not a JSON object; write one object per line.")
                rows.append((number, row))
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}


@dataclass(frozen=True)
class HuggingFaceRows:
    """A Hugging Face data set: an id on the hub, or a folder for `load_dataset` or from `save_to_disk`."""

    path: str
    config: str | None
    split: str
    pinned: str | None = None
    files: tuple[Path, ...] = ()
    """Parquet files of the split, which are then mapped into memory; empty: what `path` names."""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._dataset.column_names)

    @property
    def folder(self) -> Path:
        return self.files[0].parent if self.files else Path(self.path)

    @cached_property
    def revision(self) -> str:
        """Commit on the hub if it can be reached, else the fingerprint that the `datasets` library computes."""
        if not Path(self.path).exists():
            import huggingface_hub
            from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

            try:
                return f"hub:{huggingface_hub.HfApi().dataset_info(self.path, revision=self.pinned).sha}"
            except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
                pass
        return f"files:{self._dataset._fingerprint}"

    def __len__(self) -> int:
        return int(self._dataset.num_rows)

    def row(self, index: int) -> Row:
        row: Row = self._dataset[index]
        return row | {name: _label(row[name], names) for name, names in self._labels.items()}

    def column(self, name: str) -> list[Any]:
        values = list(self._dataset.select_columns([name])[name])
        return [_label(value, self._labels[name]) for value in values] if name in self._labels else values

    @cached_property
    def _labels(self) -> dict[str, list[str]]:
        """Names of the classes of each `ClassLabel` column."""
        import datasets

        features = self._dataset.features
        return {name: each.names for name, each in features.items() if isinstance(each, datasets.ClassLabel)}

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        try:
            dataset = self._load(datasets)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            # An error while the files are read has the reason in its cause.
            reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
            raise UserError(
                f"{self.path} (configuration {self.config}, split {self.split}) cannot be loaded: {reason}. Give the"
                " folder of a local copy with data:, or download it first on a machine with network access."
            ) from None
        return _encoded(dataset, datasets)

    def _load(self, datasets: Any) -> Any:
        if self.files:
            return datasets.load_dataset("parquet", data_files=[str(file) for file in self.files], split="train")
        folder = Path(self.path)
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(folder))
            if self.split not in splits:
                raise ValueError(f"it has the splits {', '.join(splits)}")
            return splits[self.split]
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(self.path, self.config, split=self.split, revision=self.pinned)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _label(value: int | None, names: list[str]) -> str | None:
    """Returns the name of a class; -1 stands for no class in the `datasets` library."""
    return None if value is None or value < 0 else names[value]


def _encoded(dataset: Any, datasets: Any) -> Any:
    """Returns the data set with decoding of images turned off."""

    def without_decoding(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List):
            return datasets.List(without_decoding(feature.feature), length=feature.length)
        if isinstance(feature, datasets.LargeList):
            return datasets.LargeList(without_decoding(feature.feature))
        if isinstance(feature, dict):
            return {name: without_decoding(inner) for name, inner in feature.items()}
        return feature

    features = datasets.Features({name: without_decoding(feature) for name, feature in dataset.features.items()})
    return dataset if features == dataset.features else dataset.cast(features)


def open_rows(
    source: TableSource, split: str, data: Path | None, *, config: str | None = None, at_random: bool = False
) -> Rows:
    """Opens the rows of one split.

    Args:
        source: source of the benchmark.
        split: name of the split.
        data: a parquet or JSON-lines file, a folder with such files named after the split (also below a folder named
            after the configuration, or below `data`, as on the hub), or a folder of a Hugging Face data set; None: the
            hub.
        config: configuration of the data set; None: the one of the source.
        at_random: whether rows are read in any order. Parquet files are then converted by the `datasets` library and
            mapped into memory, as reading one row of them decodes a whole row group.

    Raises:
        UserError: there are no such data.
    """
    rows = _opened(source, split, data, config if config is not None else source.config)
    if at_random and isinstance(rows, ParquetRows):
        return HuggingFaceRows(str(data), None, split, files=rows.files)
    return rows


def _opened(source: TableSource, split: str, data: Path | None, config: str | None) -> Rows:
    if data is None:
        if source.hub is None:
            where = f" ({'; '.join(source.alternatives)})" if source.alternatives else ""
            raise UserError(
                f"This benchmark is not on the Hugging Face hub{where}; give the folder of its data with data:."
            )
        return HuggingFaceRows(source.hub, config, split, source.revision)
    if not data.exists():
        raise UserError(f"{data} does not exist; give the file or folder of the benchmark's data.")
    if data.is_file():
        if data.suffix == ".parquet":
            return ParquetRows((data,))
        if data.suffix in (".jsonl", ".json"):
            return JsonlRows(data)
        raise UserError(
            f"{data} is neither a parquet nor a JSON-lines file; give such a file, or a folder of such files."
        )
    if any((data / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return HuggingFaceRows(str(data), config, split)
    return _open_named(data, config, split) or _open_unnamed(data, config, split)


def _open_named(data: Path, config: str | None, split: str) -> Rows | None:
    """Opens the files that are named after the split; None if there are none."""
    for base in (folder for folder in (data / config if config else data, data, data / "data") if folder.is_dir()):
        for pattern in (f"{split}-*.parquet", f"{split}.parquet", f"{split}/*.parquet"):
            files = tuple(sorted(base.glob(pattern)))
            if files:
                return ParquetRows(files)
        for file in (base / f"{split}.jsonl", base / f"{split}.json", base / split / "metadata.jsonl"):
            if file.is_file():
                return JsonlRows(file)
    return None


def _open_unnamed(data: Path, config: str | None, split: str) -> Rows:
    """Opens a folder without a file named after the split: a single table, or anything that `load_dataset` reads."""
    if (data / "metadata.jsonl").is_file():
        return JsonlRows(data / "metadata.jsonl")
    present = sorted(
        path.relative_to(data).as_posix() for pattern in ("*.parquet", "*.jsonl") for path in data.rglob(pattern)
    )
    if present:
        shown = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
        where = f"{config}/" if config else ""
        raise UserError(
            f"{data} has no {where}{split}-*.parquet, {split}.parquet or {split}.jsonl; it has {shown}. Give the path"
            " of the file itself, or rename it."
        )
    return HuggingFaceRows(str(data), config, split)
