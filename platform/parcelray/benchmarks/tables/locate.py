"""From a benchmark's source and where its data are to the rows of a split."""

from pathlib import Path

from parcelray.benchmarks.tables.rows import HuggingFaceRows, JsonlRows, ParquetRows, Rows
from parcelray.config.benchmark import TableSource
from parcelray.errors import UserError


def open_rows(source: TableSource, split: str, data: Path | None, *, config: str | None = None) -> Rows:
    """The rows of a split.

    Args:
        source: of the benchmark.
        split: one of its splits.
        data: a parquet or JSON-lines file, a folder with such files named after the split (also below a folder named
            after the configuration, or below `data`, as on the hub), or a folder of a Hugging Face data set; None: the
            hub.
        config: configuration, where it is not the source's.

    Raises:
        UserError: there is nothing of the kind.
    """
    config = config if config is not None else source.config
    if data is None:
        if source.hub is None:
            where = f" ({'; '.join(source.alternatives)})" if source.alternatives else ""
            raise UserError(
                f"This benchmark has no copy on the Hugging Face hub{where}; give the folder of its data with data:."
            )
        return HuggingFaceRows(source.hub, config, split, source.revision)
    if not data.exists():
        raise UserError(f"{data} does not exist; give the file or folder of the benchmark's data.")
    if data.is_file():
        if data.suffix == ".parquet":
            return ParquetRows((data,))
        if data.suffix in (".jsonl", ".json"):
            return JsonlRows(data)
        raise UserError(f"{data} is neither a parquet nor a JSON-lines file; give one of them, or a folder of them.")
    if any((data / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return HuggingFaceRows(str(data), config, split)
    for base in (folder for folder in (data / config if config else data, data, data / "data") if folder.is_dir()):
        for pattern in (f"{split}-*.parquet", f"{split}.parquet", f"{split}/*.parquet"):
            files = tuple(sorted(base.glob(pattern)))
            if files:
                return ParquetRows(files)
        if (base / f"{split}.jsonl").is_file():
            return JsonlRows(base / f"{split}.jsonl")
    return _only(data, config, split)


def _only(data: Path, config: str | None, split: str) -> Rows:
    """Nothing is named after the split: a folder that holds a single table, or whatever `load_dataset` can read."""
    if (data / "metadata.jsonl").is_file():
        return JsonlRows(data / "metadata.jsonl")
    present = sorted(
        path.relative_to(data).as_posix() for pattern in ("*.parquet", "*.jsonl") for path in data.rglob(pattern)
    )
    if present:
        shown = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
        where = f"{config}/" if config else ""
        raise UserError(
            f"{data} has no {where}{split}-*.parquet, {split}.parquet or {split}.jsonl; it has {shown}. Name the file"
            " itself, or rename it."
        )
    return HuggingFaceRows(str(data), config, split)
