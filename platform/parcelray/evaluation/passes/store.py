"""Answers on disk: parquet shards under a folder or any fsspec URI, each answer under a key of everything that decides it.

The key holds what changes an answer (weights, budget, arithmetic, prompt, images, generation settings) and nothing of
who computed it, so a rerun on another number of workers finds what is there. Shards are only ever added. A shard's name
is derived from its keys: a block of answers that is computed twice, after a crash between writing and reporting, takes
its own place.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.predict.generation import GenerationSettings

_SCHEMA = pa.schema(
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
_LAYOUT = 2
"""Of a stored answer, and part of its key: a shard of an older layout lacks columns, so its answers are computed again."""
_MODEL_FOLDER_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer."""

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
    """Tokens of the answer, its end included."""
    cut_off: bool
    """Whether the answer reached `max_new_tokens` without an end."""
    mean_log_prob: float | None = None
    """See `Confidence`."""
    entropy: float | None = None
    """See `Confidence`."""


def prediction_key(sample: Sample, *, model: str, num_visual_tokens: int, settings: GenerationSettings) -> str:
    """SHA-256 over everything that decides an answer: 64 hexadecimal digits."""
    images = [hashlib.sha256(image).hexdigest() for image in sample.images]
    parts = [_LAYOUT, sample.benchmark, sample.id, model, num_visual_tokens, settings.to_json(), sample.prompt, images]
    if settings.decoding == "likelihood":
        parts.append(sample.metadata.get("choices"))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class PredictionStore:
    """Answers of any number of benchmarks, models and budgets, in one folder for each benchmark and model.

    Args:
        uri: folder or fsspec URI; made when the first shard is written.
        keep: whether to hold shards once they were read: for a process that reads the same ones again and again. They
            never change.
    """

    def __init__(self, uri: str, *, keep: bool = False) -> None:
        self._filesystem, self._root = fsspec.core.url_to_fs(uri)
        self._keep = keep
        self._kept: dict[str, dict[str, Prediction]] = {}
        self._kept_keys: dict[str, frozenset[str]] = {}

    def keys(self, benchmark: str, model: str) -> frozenset[str]:
        """The keys of a model's answers on a benchmark."""
        return frozenset[str]().union(*(self._keys_of(shard) for shard in self._shards(benchmark, model)))

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Adds answers as one shard for each benchmark and model, whole or not at all."""
        groups: dict[str, list[Prediction]] = {}
        for prediction in predictions:
            groups.setdefault(self._folder(prediction.benchmark, prediction.model), []).append(prediction)
        for folder, members in groups.items():
            name = hashlib.sha256("".join(sorted(prediction.key for prediction in members)).encode()).hexdigest()[:32]
            table = pa.Table.from_pylist([asdict(prediction) for prediction in members], schema=_SCHEMA)
            self._filesystem.makedirs(folder, exist_ok=True)
            # Written aside and moved: a reader must never see half a shard. Two writers of the same answers write the
            # same shard.
            aside = f"{folder}/.{name}.partial"
            with self._filesystem.open(aside, "wb") as file:
                pq.write_table(table, file)
            self._filesystem.mv(aside, f"{folder}/{name}.parquet")

    def read(self, benchmark: str, model: str, keys: Iterable[str]) -> dict[str, Prediction]:
        """The answers under keys, by key; those that are not there are left out."""
        wanted = set(keys)
        found: dict[str, Prediction] = {}
        for shard in self._shards(benchmark, model):
            # This spares a shard of an older layout, too: no key of today asks for it.
            if not wanted.isdisjoint(self._keys_of(shard)):
                predictions = self._predictions(shard)
                found = {key: predictions[key] for key in wanted & predictions.keys()} | found
        return found

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
        predictions = {row["key"]: Prediction(**row) for row in self._read(shard, _SCHEMA.names).to_pylist()}
        if self._keep:
            self._kept[shard] = predictions
        return predictions

    def _folder(self, benchmark: str, model: str) -> str:
        return f"{self._root}/{benchmark}/{model.removeprefix('sha256:')[:_MODEL_FOLDER_DIGITS]}"

    def _shards(self, benchmark: str, model: str) -> list[str]:
        folder = self._folder(benchmark, model)
        # Listings of some file systems are cached, and other processes write here.
        self._filesystem.invalidate_cache()
        if not self._filesystem.exists(folder):
            return []
        return sorted(path for path in self._filesystem.ls(folder, detail=False) if path.endswith(".parquet"))

    def _read(self, shard: str, columns: list[str]) -> pa.Table:
        try:
            with self._filesystem.open(shard, "rb") as file:
                return pq.read_table(file, columns=columns)
        except (pa.ArrowInvalid, KeyError) as error:
            raise UserError(
                f"{shard} is not a shard of answers ({error}); remove it, and its answers are computed again."
            ) from error
