"""The parts of an evaluation pass: prepared benchmarks, shards of their rows, and the result of each shard.

This module imports neither Ray nor torch, so that processes that only read data start quickly and stay small.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from parcelray.benchmarks.readers.base import BenchmarkReader, Problem
from parcelray.config.benchmark import BenchmarkConfig
from parcelray.config.evaluate import BenchmarkChoice
from parcelray.datasets.sample import Sample
from parcelray.evaluation.passes.store import EvaluatedBenchmark, PredictionStore, SampleRecord, prediction_key
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.models.checkpoint import ModelPin

OnProgress = Callable[[str, int, int], None]
"""Called with the name of a benchmark, its number of finished rows, and its total number of rows."""


@dataclass(frozen=True)
class PreparedBenchmark:
    """A benchmark that is ready to be evaluated."""

    choice: BenchmarkChoice
    """The entry in the job file."""
    config: BenchmarkConfig
    reader: BenchmarkReader
    rows: Sequence[int]
    """Rows to evaluate, in the order in which they are read; rows that share images are adjacent."""
    generation: GenerationSettings
    """Settings of the generation of answers."""


@dataclass(frozen=True)
class EvaluatedModel:
    """The model of a pass, its budgets, and where its predictions are stored."""

    folder: Path
    """Folder of the checkpoint on this host."""
    pin: ModelPin
    """The checkpoint, which each worker opens on its own host."""
    budgets: tuple[int, ...]
    """Visual tokens per image; 0: blind."""
    store: str
    """Folder or URI of the stored predictions, reachable from every node."""

    @property
    def digest(self) -> str:
        """Digest of the checkpoint's files, part of every prediction key."""
        return self.pin.digest


class PassResult(NamedTuple):
    """The result of a pass over all benchmarks."""

    benchmarks: tuple[EvaluatedBenchmark, ...]
    """Evaluated benchmarks, in the order of the prepared ones."""
    computed: int
    """Number of predictions that were computed."""
    present: int
    """Number of predictions that were reused from the store."""


class Shard(NamedTuple):
    """Rows of one benchmark that are read, evaluated and stored together."""

    number: int
    benchmark: int
    """Index of the benchmark in the pass."""
    rows: tuple[int, ...]


class ShardInput(NamedTuple):
    """The samples of a shard, and which of their predictions are missing in the store."""

    shard: Shard
    benchmark: str
    """Name of the benchmark."""
    generation: GenerationSettings
    records: list[SampleRecord]
    problems: list[Problem]
    missing: dict[int, list[int]]
    """Indices, by budget, of the records without a stored prediction."""
    samples: dict[int, Sample]
    """The samples that lack a prediction at some budget, by the index of their record."""


class ShardResult(NamedTuple):
    """The outcome of a shard whose predictions are all stored."""

    shard: Shard
    records: list[SampleRecord]
    problems: list[Problem]
    computed: int
    """Number of predictions that were computed."""
    present: int
    """Number of predictions that were reused from the store."""


def make_shards(benchmarks: Sequence[PreparedBenchmark], size: int) -> list[Shard]:
    """Splits the rows of all benchmarks into shards of at most `size` rows, each of one benchmark."""
    starts = [(number, start) for number, each in enumerate(benchmarks) for start in range(0, len(each.rows), size)]
    return [
        Shard(index, number, tuple(benchmarks[number].rows[start : start + size]))
        for index, (number, start) in enumerate(starts)
    ]


def dtype_of(benchmarks: Sequence[PreparedBenchmark]) -> str:
    """Returns the dtype of the model, which all benchmarks of a pass must agree on.

    Raises:
        ValueError: the benchmarks name different dtypes.
    """
    dtypes = {each.generation.dtype for each in benchmarks}
    if len(dtypes) != 1:
        raise ValueError(
            f"the benchmarks of a pass share one copy of the model, but name the dtypes {sorted(dtypes)}; use one dtype"
        )
    return dtypes.pop()


def stored_keys(
    benchmarks: Sequence[PreparedBenchmark], model: EvaluatedModel, store: PredictionStore
) -> list[frozenset[str]]:
    """Returns the keys of the model's stored predictions, for each benchmark."""
    return [store.keys(each.config.name, model.digest) for each in benchmarks]


def read_shard(
    shard: Shard, benchmark: PreparedBenchmark, model: EvaluatedModel, present: frozenset[str]
) -> ShardInput:
    """Reads the rows of a shard and determines which predictions are missing.

    Args:
        shard: rows to read.
        benchmark: the benchmark of the shard.
        model: the evaluated model.
        present: keys of the model's stored predictions on the benchmark.
    """
    read = ShardInput(
        shard, benchmark.config.name, benchmark.generation, [], [], {budget: [] for budget in model.budgets}, {}
    )
    for row in shard.rows:
        found = benchmark.reader.read(row)
        read.problems.extend(found.problems)
        for sample in found.samples:
            keys = {
                budget: prediction_key(
                    sample, model=model.digest, num_visual_tokens=budget, settings=benchmark.generation
                )
                for budget in model.budgets
            }
            for budget, key in keys.items():
                if key not in present:
                    read.missing[budget].append(len(read.records))
                    read.samples[len(read.records)] = sample
            read.records.append(SampleRecord.of(sample, keys))
    return read


def collect(
    benchmarks: Sequence[PreparedBenchmark], finished: Iterable[ShardResult], on_progress: OnProgress
) -> PassResult:
    """Joins the results of shards, which may finish in any order, to the result of the pass."""
    parts: dict[int, list[ShardResult]] = {number: [] for number in range(len(benchmarks))}
    for result in finished:
        benchmark, own = benchmarks[result.shard.benchmark], parts[result.shard.benchmark]
        own.append(result)
        on_progress(benchmark.config.name, sum(len(part.shard.rows) for part in own), len(benchmark.rows))
    results = [result for own in parts.values() for result in own]
    return PassResult(
        tuple(_joined(each, parts[number]) for number, each in enumerate(benchmarks)),
        computed=sum(result.computed for result in results),
        present=sum(result.present for result in results),
    )


def _joined(benchmark: PreparedBenchmark, parts: list[ShardResult]) -> EvaluatedBenchmark:
    parts = sorted(parts, key=lambda result: result.shard.number)
    return EvaluatedBenchmark(
        config=benchmark.config,
        metric=benchmark.choice.metric,
        records=[record for result in parts for record in result.records],
        problems=[problem for result in parts for problem in result.problems],
        fingerprint=benchmark.reader.fingerprint(),
        rows=len(benchmark.rows),
    )
