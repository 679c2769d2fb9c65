"""The stored files of an evaluation: predictions, and the samples of each benchmark with their prediction keys.

Predictions are parquet shards in a folder or under any fsspec URI. The key of a prediction holds everything that can
change it: weights, budget, dtype, prompt, images and generation settings. It does not depend on the workers, so a rerun
with another number of workers reuses the stored predictions. Shards are only ever added. The name of a shard is a hash
of its keys: if predictions are computed twice, after a crash between writing and reporting, the second shard replaces
the first.

With the stored predictions and the records of the samples, an evaluation can be scored again without the model and
without the data.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from parcelray.benchmarks.readers.base import DatasetFingerprint, Problem
from parcelray.config.benchmark import BenchmarkConfig
from parcelray.datasets.sample import Sample
from parcelray.errors import SystemFailure, UserError
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.files import atomic_write, is_written, listing_wait_s, modified_at, open_storage, read_json, write_json
from parcelray.tracking.runs import MODEL_FOLDER_DIGITS

_PREDICTION_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("benchmark", pa.string()),
        ("sample_id", pa.string()),
        ("model", pa.string()),
        ("num_visual_tokens", pa.int32()),
        ("settings", pa.string()),
        ("text", pa.string()),
        ("num_new_tokens", pa.int32()),
        ("cut_off", pa.bool_()),
        ("mean_log_prob", pa.float64()),
        ("entropy", pa.float64()),
    ]
)
_VERSION = 3
"""Version of the columns above and of the rules that turn images and texts into answers; part of every key.

Predictions of an older version are computed again. They can still be scored.
"""
_IN_USE_S = 3600.0
"""Age up to which a shard may belong to an evaluation that is still running, seconds."""
_POLL_S = 1.0
"""Pause between two listings, seconds."""
_RECORDS, _PROBLEMS, _DATA = "samples.parquet", "problems.json", "data.json"
_EVALUATE_AGAIN = "remove it, and run the evaluation again, which computes only missing predictions"
_TEXT_FIELDS = ("id", "benchmark", "family", "task", "prompt", "metric", "scene")
_RECORD_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _TEXT_FIELDS),
        ("answers", pa.list_(pa.string())),
        ("metadata", pa.string()),
        ("num_images", pa.int32()),
        ("keys", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A stored prediction: the model's answer to one sample at one budget."""

    key: str
    """SHA-256, see `prediction_key`."""
    benchmark: str
    sample_id: str
    model: str
    """Digest of the weights."""
    num_visual_tokens: int
    """Visual tokens per image; 0: blind."""
    settings: str
    """`GenerationSettings.to_json`."""
    text: str
    num_new_tokens: int
    """Generated tokens, including the end token."""
    cut_off: bool
    """Whether the answer reached `max_new_tokens` without an end token."""
    mean_log_prob: float | None = None
    """See `Confidence`."""
    entropy: float | None = None
    """See `Confidence`."""


def prediction_key(sample: Sample, *, model: str, num_visual_tokens: int, settings: GenerationSettings) -> str:
    """Computes the SHA-256 over everything that can change a prediction: 64 hexadecimal digits."""
    images = [hashlib.sha256(image).hexdigest() for image in sample.images]
    parts = [_VERSION, sample.benchmark, sample.id, model, num_visual_tokens, settings.to_json(), sample.prompt, images]
    if settings.decoding == "likelihood":
        parts.append(sample.metadata.get("candidates") or sample.metadata.get("choices"))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class PredictionStore:
    """Stored predictions of any number of benchmarks, models and budgets, in one folder per benchmark and model.

    Args:
        uri: folder or fsspec URI; created when the first shard is written.
        keep: whether to keep shards in memory once they were read. This is for a process that reads the same shards
            repeatedly; shards never change.
    """

    def __init__(self, uri: str, *, keep: bool = False) -> None:
        self._filesystem, self._root = open_storage(uri)
        self._keep = keep
        self._kept: dict[str, dict[str, Prediction]] = {}
        self._kept_keys: dict[str, frozenset[str]] = {}

    def keys(self, benchmark: str, model: str) -> frozenset[str]:
        """Returns the keys of all stored predictions of a model on a benchmark."""
        return frozenset[str]().union(*(self._keys_of(shard) for shard in self._shards(benchmark, model)))

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Adds predictions as one shard per benchmark and model; each shard is written atomically."""
        groups: dict[str, list[Prediction]] = {}
        for prediction in predictions:
            groups.setdefault(self._folder(prediction.benchmark, prediction.model), []).append(prediction)
        for folder, members in groups.items():
            name = hashlib.sha256("".join(sorted(prediction.key for prediction in members)).encode()).hexdigest()[:32]
            table = pa.Table.from_pylist([asdict(prediction) for prediction in members], schema=_PREDICTION_SCHEMA)
            # A reader must never see half a shard. Two writers of the same predictions write the same shard.
            with atomic_write(f"{folder}/{name}.parquet", self._filesystem) as file:
                pq.write_table(table, file)

    def read(self, benchmark: str, model: str, keys: Iterable[str]) -> dict[str, Prediction]:
        """Reads the predictions under some keys, by key; keys that are not stored are left out.

        On object storage, a listing may not show a new shard at once, so missing keys are waited for, half a minute.
        """
        wanted = set(keys)
        found: dict[str, Prediction] = {}
        until = time.monotonic() + listing_wait_s(self._filesystem)
        searched: set[str] = set()
        while True:
            shards = [shard for shard in self._shards(benchmark, model) if shard not in searched]
            searched.update(shards)
            for shard in shards:
                # This also skips shards in an older layout, because no current key is in one.
                if not (wanted - found.keys()).isdisjoint(self._keys_of(shard)):
                    predictions = self._predictions(shard)
                    found |= {key: predictions[key] for key in wanted & predictions.keys()}
            if len(found) == len(wanted) or time.monotonic() >= until:
                return found
            time.sleep(_POLL_S)

    def limit(self, max_bytes: int, in_use: Iterable[tuple[str, str]]) -> int:
        """Deletes the oldest shards until the store has at most `max_bytes`; returns the number of deleted shards.

        Args:
            max_bytes: largest size of all shards, bytes.
            in_use: pairs of benchmark and model whose shards are kept. Shards of the last hour are kept too, because
                another evaluation may need them.
        """
        shards = [
            (modified_at(info), name, info["size"])
            for name, info in self._filesystem.find(self._root, detail=True).items()
        ]
        kept = {self._folder(benchmark, model) for benchmark, model in in_use}
        excess, deleted = sum(size for _, _, size in shards) - max_bytes, 0
        for modified, name, size in sorted(shards):
            if excess <= 0 or modified > time.time() - _IN_USE_S:
                break
            if name.rpartition("/")[0] not in kept:
                self._filesystem.rm_file(name)
                excess, deleted = excess - size, deleted + 1
        return deleted

    def _keys_of(self, shard: str) -> frozenset[str]:
        if shard in self._kept_keys:
            return self._kept_keys[shard]
        keys = frozenset(self._read(shard, ["key"])["key"].to_pylist())
        if self._keep:
            self._kept_keys[shard] = keys
        return keys

    def _predictions(self, shard: str) -> dict[str, Prediction]:
        if shard in self._kept:
            return self._kept[shard]
        predictions = {row["key"]: Prediction(**row) for row in self._read(shard, _PREDICTION_SCHEMA.names).to_pylist()}
        if self._keep:
            self._kept[shard] = predictions
        return predictions

    def _folder(self, benchmark: str, model: str) -> str:
        return f"{self._root}/{benchmark}/{model.removeprefix('sha256:')[:MODEL_FOLDER_DIGITS]}"

    def _shards(self, benchmark: str, model: str) -> list[str]:
        folder = self._folder(benchmark, model)
        try:
            entries = self._filesystem.ls(folder, detail=True)
        except FileNotFoundError:
            return []
        return sorted(
            entry["name"]
            for entry in entries
            # An empty shard is what a power loss leaves; its predictions are computed again.
            if entry["name"].endswith(".parquet") and entry["size"] > 0
        )

    def _read(self, shard: str, columns: list[str]) -> pa.Table:
        try:
            with self._filesystem.open(shard, "rb") as file:
                return pq.read_table(file, columns=columns)
        except (pa.ArrowException, KeyError, EOFError, OSError) as error:
            # Arrow also reports a damaged page as an error of the operating system, but without a number.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise SystemFailure(
                f"{shard} is not a shard of predictions ({_first_line(error)}); remove it, and its predictions are"
                " computed again."
            ) from error


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """An evaluated sample without its images, with the key of its prediction at every budget."""

    sample: Sample
    """The sample; its `images` are empty."""
    num_images: int
    """Number of images that the sample has."""
    keys: Mapping[int, str]
    """Prediction key, by budget."""

    @classmethod
    def of(cls, sample: Sample, keys: Mapping[int, str]) -> "SampleRecord":
        """Creates the record of a sample, leaving its images out."""
        return cls(replace(sample, images=()), len(sample.images), keys)


@dataclass(frozen=True)
class EvaluatedBenchmark:
    """A benchmark of a finished evaluation: everything that is needed to score its stored predictions."""

    config: BenchmarkConfig
    metric: str | None
    """Metric and variant that replace the benchmark's own; None: its own."""
    records: Sequence[SampleRecord]
    """The evaluated samples, in the order of the reader."""
    problems: Sequence[Problem]
    """Samples and rows that could not be evaluated."""
    fingerprint: DatasetFingerprint
    """Identifies the data."""
    rows: int
    """Number of rows that were read: all rows of the data, or a part of them."""

    def save(self, folder: Path) -> None:
        """Writes the records, problems and data fingerprint to `folder/asked/NAME`; the fingerprint is written last."""
        own = _benchmark_folder(folder, self.config.name)
        rows = [
            {name: getattr(each.sample, name) for name in _TEXT_FIELDS}
            | {
                "answers": list(each.sample.answers),
                "metadata": json.dumps(each.sample.metadata),
                "num_images": each.num_images,
                "keys": json.dumps({str(budget): key for budget, key in each.keys.items()}),
            }
            for each in self.records
        ]
        with atomic_write(own / _RECORDS) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=_RECORD_SCHEMA), file)
        write_json(own / _PROBLEMS, [problem._asdict() for problem in self.problems])
        write_json(own / _DATA, {"pin": self.fingerprint._asdict(), "rows": self.rows})

    @classmethod
    def load(cls, folder: Path, config: BenchmarkConfig, metric: str | None) -> "EvaluatedBenchmark":
        """Reads a benchmark that `save` wrote.

        Raises:
            SystemFailure: the folder of the evaluation has no complete record of the benchmark, or a damaged one.
        """
        own = _benchmark_folder(folder, config.name)
        data, problems = _saved_data(folder, config.name), read_json(own / _PROBLEMS, _EVALUATE_AGAIN)
        if data is None or problems is None or not is_written(own / _RECORDS):
            raise SystemFailure(
                f"{own} has no complete record of the samples of {config.name}; run the evaluation again."
            )
        try:
            rows = pq.read_table(own / _RECORDS, columns=_RECORD_SCHEMA.names).to_pylist()
        except (pa.ArrowException, KeyError) as error:
            raise SystemFailure(f"{own / _RECORDS} is damaged ({_first_line(error)}); {_EVALUATE_AGAIN}.") from error
        return cls(
            config=config,
            metric=metric,
            records=[_record_of(row) for row in rows],
            problems=[Problem(**each) for each in problems],
            fingerprint=DatasetFingerprint(**data["pin"]),
            rows=data["rows"],
        )


def check_fingerprint(folder: Path, benchmark: str, found: DatasetFingerprint) -> None:
    """Refuses data that differ from those of an earlier evaluation in the same folder.

    Raises:
        UserError: the data changed; the message names the fields that differ.
    """
    saved = _saved_data(folder, benchmark)
    if saved is None or found == DatasetFingerprint(**saved["pin"]):
        return
    changes = [
        f"{field} {saved['pin'][field]} -> {value}"
        for field, value in found._asdict().items()
        if value != saved["pin"][field]
    ]
    raise UserError(
        f"{benchmark}: the data differ from the data of this evaluation's earlier run ({'; '.join(changes)}); restore"
        " the earlier data, or give the job another name."
    )


def _saved_data(folder: Path, benchmark: str) -> dict[str, Any] | None:
    data: dict[str, Any] | None = read_json(_benchmark_folder(folder, benchmark) / _DATA, _EVALUATE_AGAIN)
    return data


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _benchmark_folder(folder: Path, benchmark: str) -> Path:
    return folder / "asked" / benchmark


def _record_of(row: dict[str, Any]) -> SampleRecord:
    sample = Sample(
        **{name: row[name] for name in _TEXT_FIELDS},
        images=(),
        answers=tuple(row["answers"]),
        metadata=json.loads(row["metadata"]),
    )
    keys = {int(budget): key for budget, key in json.loads(row["keys"]).items()}
    return SampleRecord(sample, row["num_images"], keys)
