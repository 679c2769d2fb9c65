"""The parts of a pass over benchmarks: bundles of rows, what is read of them, and what the store lacks.

Neither Ray nor torch is imported here, so processes that only read start quickly and stay small.
"""

import functools
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from parcelray.benchmarks.readers.base import BenchmarkReader, Problem
from parcelray.datasets.sample import Sample
from parcelray.evaluation.passes.records import Asked, Record, record
from parcelray.evaluation.passes.store import PredictionStore, prediction_key
from parcelray.evaluation.predict.generation import GenerationSettings


@dataclass(frozen=True)
class BenchmarkTask:
    """One benchmark of a pass."""

    reader: BenchmarkReader
    rows: Sequence[int]
    """Which rows, in the order in which they are read; those that share images next to each other."""
    generation: GenerationSettings
    """How answers are made."""


@dataclass(frozen=True)
class EvaluatedModel:
    """The model of a pass, and where its answers are kept."""

    folder: Path
    """Checkpoint on the driver's node."""
    reference: str
    """The checkpoint, pinned: what a node resolves that does not see the folder."""
    digest: str
    """Of the weights; part of every answer's key."""
    budgets: tuple[int, ...]
    """Visual tokens per image; 0: blind."""
    store: str
    """Folder or URI of the answers that every node reaches."""


@dataclass(frozen=True)
class PassSettings:
    """How a pass uses the cluster; none of it changes an answer."""

    actors: int = 1
    """Copies of the model."""
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    """May be a fraction: several actors share a GPU."""
    threads_per_actor: int | None = None
    """Threads of an actor's arithmetic on a CPU; None: the node's cores divided by the actors."""
    readers: int = 1
    """Tasks that read rows at the same time."""
    batch_size: int = 64
    """Images per batch of the encoder and of the decoder."""
    rows_per_bundle: int = 128
    """Rows that are read, answered and stored together: what a crash can cost an actor."""
    feature_cache_gb: float = 1.0
    """GiB of patch features that a search's actor keeps between its trials."""
    stall_s: float = 600.0
    """Longest time without a finished bundle before the pass gives up and names the stage that hangs."""


DEFAULT_PASS = PassSettings()


class BenchmarkPass(NamedTuple):
    """What a pass did on one benchmark."""

    asked: Asked
    computed: int
    """Answers computed now."""
    present: int
    """Answers that the store had."""


class Kind(NamedTuple):
    """What workers need of a benchmark."""

    reader: bytes
    """Pickled, so that a process opens its files once and not with every bundle."""
    name: str
    generation: GenerationSettings


class Bundle(NamedTuple):
    number: int
    task: int
    rows: tuple[int, ...]


class Work(NamedTuple):
    """A bundle that was read."""

    bundle: Bundle
    records: list[Record]
    problems: list[Problem]
    missing: dict[int, list[int]]
    """By budget, which of the records lack an answer."""
    samples: dict[int, Sample]
    """Those that lack one, by their place among the records."""


class Done(NamedTuple):
    """A bundle that was answered and stored."""

    bundle: Bundle
    records: list[Record]
    problems: list[Problem]
    computed: int
    present: int


def make_bundles(tasks: Sequence[BenchmarkTask], size: int) -> list[Bundle]:
    """The rows of all benchmarks in bundles of one benchmark each."""
    places = [(number, start) for number, task in enumerate(tasks) for start in range(0, len(task.rows), size)]
    return [
        Bundle(index, number, tuple(tasks[number].rows[start : start + size]))
        for index, (number, start) in enumerate(places)
    ]


def dtype_of(tasks: Sequence[BenchmarkTask]) -> str:
    """The arithmetic that all benchmarks of a pass ask for.

    Raises:
        ValueError: they do not agree on one.
    """
    dtypes = {task.generation.dtype for task in tasks}
    if len(dtypes) != 1:
        raise ValueError("the benchmarks of a pass share one copy of the model, so their arithmetic must be the same")
    return dtypes.pop()


def kinds_of(tasks: Sequence[BenchmarkTask]) -> list[Kind]:
    """What workers need of the benchmarks."""
    dtype_of(tasks)
    return [Kind(pickle.dumps(task.reader), task.reader.name, task.generation) for task in tasks]


def stored_keys(
    tasks: Sequence[BenchmarkTask], model: EvaluatedModel, store: PredictionStore | None = None
) -> list[frozenset[str]]:
    """By benchmark, the keys of the answers that are there."""
    store = store or PredictionStore(model.store)
    return [store.keys(task.reader.name, model.digest) for task in tasks]


def collect(
    tasks: Sequence[BenchmarkTask], finished: Iterable[Done], on_progress: Callable[[str, int, int], None]
) -> dict[str, BenchmarkPass]:
    """Joins bundles as they finish, in any order, to what was asked of each benchmark."""
    parts: dict[int, list[Done]] = {number: [] for number in range(len(tasks))}
    for done in finished:
        number = done.bundle.task
        parts[number].append(done)
        on_progress(
            tasks[number].reader.name, sum(len(part.bundle.rows) for part in parts[number]), len(tasks[number].rows)
        )
    return {task.reader.name: _joined(task, parts[number]) for number, task in enumerate(tasks)}


def _joined(task: BenchmarkTask, parts: list[Done]) -> BenchmarkPass:
    parts = sorted(parts, key=lambda done: done.bundle.number)
    records = [each for done in parts for each in done.records]
    problems = [problem for done in parts for problem in done.problems]
    asked = Asked(records, problems, task.reader.fingerprint(), len(task.rows))
    return BenchmarkPass(asked, sum(done.computed for done in parts), sum(done.present for done in parts))


def read_bundle(
    reader: BenchmarkReader,
    generation: GenerationSettings,
    bundle: Bundle,
    model: EvaluatedModel,
    present: frozenset[str],
) -> Work:
    """Reads a bundle and leaves out what the store has."""
    work = Work(bundle, [], [], {budget: [] for budget in model.budgets}, {})
    for row in bundle.rows:
        found = reader.read(row)
        work.problems.extend(found.problems)
        for sample in found.samples:
            keys = {
                budget: prediction_key(sample, model=model.digest, num_visual_tokens=budget, settings=generation)
                for budget in model.budgets
            }
            for budget, key in keys.items():
                if key not in present:
                    work.missing[budget].append(len(work.records))
                    work.samples[len(work.records)] = sample
            work.records.append(record(sample, keys))
    return work


@functools.lru_cache(maxsize=64)
def opened(reader: bytes) -> BenchmarkReader:
    """A pickled reader, opened once a process."""
    found: BenchmarkReader = pickle.loads(reader)
    return found
