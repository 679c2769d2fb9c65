"""A pass over benchmarks bundle by bundle: read, leave out what is there, answer at every budget, store. Nothing here knows of Ray."""

import functools
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from parcelray.benchmarks.reader import BenchmarkReader, Problem
from parcelray.data.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.generation import GenerationSettings
from parcelray.evaluation.predictor import Answer, Predictor
from parcelray.evaluation.records import Asked, Record, record
from parcelray.evaluation.store import Prediction, PredictionStore, prediction_key
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.processor import ElasticPaliGemmaProcessor
from parcelray.models.vlm import ElasticPaliGemmaForConditionalGeneration, load_vlm, use_sdpa_where_exact
from parcelray.training.allocator import keep_freed_memory

Stage = Callable[[str], None]
"""Is told what begins, for the message of a pass that hangs."""


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
    stall_s: float = 600.0
    """Longest time without a finished bundle before the pass gives up and names the stage that hangs."""


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
    return [Bundle(index, number, tuple(tasks[number].rows[start : start + size])) for index, (number, start) in enumerate(places)]


def kinds_of(tasks: Sequence[BenchmarkTask]) -> list[Kind]:
    """What workers need of the benchmarks.

    Raises:
        ValueError: they do not agree on the arithmetic.
    """
    if len({task.generation.dtype for task in tasks}) > 1:
        raise ValueError("the benchmarks of a pass share one copy of the model, so their arithmetic must be the same")
    return [Kind(pickle.dumps(task.reader), task.reader.name, task.generation) for task in tasks]


def stored_keys(tasks: Sequence[BenchmarkTask], model: EvaluatedModel) -> list[frozenset[str]]:
    """By benchmark, the keys of the answers that are there."""
    store = PredictionStore(model.store)
    return [store.keys(task.reader.name, model.digest) for task in tasks]


def collect(tasks: Sequence[BenchmarkTask], finished: Iterable[Done], on_progress: Callable[[str, int, int], None]) -> dict[str, BenchmarkPass]:
    """Joins bundles as they finish, in any order, to what was asked of each benchmark."""
    parts: dict[int, list[Done]] = {number: [] for number in range(len(tasks))}
    for done in finished:
        number = done.bundle.task
        parts[number].append(done)
        on_progress(tasks[number].reader.name, sum(len(part.bundle.rows) for part in parts[number]), len(tasks[number].rows))
    return {task.reader.name: _joined(task, parts[number]) for number, task in enumerate(tasks)}


def run_pass_in_process(
    tasks: Sequence[BenchmarkTask],
    model: EvaluatedModel,
    *,
    settings: PassSettings = PassSettings(),
    on_progress: Callable[[str, int, int], None] = lambda benchmark, rows, total: None,
) -> dict[str, BenchmarkPass]:
    """The pass in this process, one bundle after the other; see `evaluate.run_pass`."""
    kinds, present = kinds_of(tasks), stored_keys(tasks, model)
    answerer = Answerer(kinds, model, settings)

    def finished() -> Iterator[Done]:
        for bundle in make_bundles(tasks, settings.rows_per_bundle):
            yield answerer.answer(read_bundle(kinds[bundle.task], bundle, model, present[bundle.task]))

    return collect(tasks, finished(), on_progress)


def _joined(task: BenchmarkTask, parts: list[Done]) -> BenchmarkPass:
    parts = sorted(parts, key=lambda done: done.bundle.number)
    records = [each for done in parts for each in done.records]
    problems = [problem for done in parts for problem in done.problems]
    asked = Asked(records, problems, task.reader.pin(), len(task.rows))
    return BenchmarkPass(asked, sum(done.computed for done in parts), sum(done.present for done in parts))


def read_bundle(kind: Kind, bundle: Bundle, model: EvaluatedModel, present: frozenset[str]) -> Work:
    """Reads a bundle and leaves out what the store has."""
    reader = _opened(kind.reader)
    work = Work(bundle, [], [], {budget: [] for budget in model.budgets}, {})
    for row in bundle.rows:
        found = reader.read(row)
        work.problems.extend(found.problems)
        for sample in found.samples:
            keys = {budget: prediction_key(sample, model=model.digest, num_visual_tokens=budget, settings=kind.generation) for budget in model.budgets}
            for budget, key in keys.items():
                if key not in present:
                    work.missing[budget].append(len(work.records))
                    work.samples[len(work.records)] = sample
            work.records.append(record(sample, keys))
    return work


@functools.lru_cache(maxsize=64)
def _opened(reader: bytes) -> BenchmarkReader:
    found: BenchmarkReader = pickle.loads(reader)
    return found


class Answerer:
    """Holds the model, from the first bundle that needs it on.

    Args:
        kinds: of the benchmarks.
        model: what answers.
        settings: of the pass.
    """

    def __init__(self, kinds: Sequence[Kind], model: EvaluatedModel, settings: PassSettings) -> None:
        self._kinds = kinds
        self._model = model
        self._settings = settings
        self._store = PredictionStore(model.store)
        self._predictors: dict[GenerationSettings, Predictor] = {}

    def answer(self, work: Work, begin: Stage = lambda stage: None) -> Done:
        """Answers what is missing of a bundle and stores it."""
        kind = self._kinds[work.bundle.task]
        unreadable: dict[str, str] = {}
        computed = 0
        # Mostly every budget lacks the same samples; budgets that do share one encoding of their images.
        for budgets, places in _alike(work.missing):
            samples = [work.samples[place] for place in places]
            begin(f"answering samples {samples[0].id} to {samples[-1].id} of {kind.name} at {', '.join(map(str, budgets))} visual tokens")
            answers = self._predictor(kind.generation, begin).answer_budgets(samples, budgets)
            found = [
                self._prediction(kind, work.records[place], budget, answer)
                for budget in budgets
                for place, answer in zip(places, answers[budget], strict=True)
                if not answer.problem
            ]
            unreadable |= {sample.id: answer.problem for sample, answer in zip(samples, answers[budgets[0]], strict=True) if answer.problem}
            begin(f"storing {len(found)} answers on {kind.name}")
            self._store.write(found)
            computed += len(found)
        records = [each for each in work.records if each.sample.id not in unreadable]
        problems = [*work.problems, *(Problem(name, reason) for name, reason in unreadable.items())]
        present = len(work.records) * len(work.missing) - sum(map(len, work.missing.values()))
        return Done(work.bundle, records, problems, computed, present)

    def _prediction(self, kind: Kind, asked: Record, budget: int, answer: Answer) -> Prediction:
        return Prediction(
            key=asked.keys[budget],
            benchmark=kind.name,
            sample_id=asked.sample.id,
            model=self._model.digest,
            num_visual_tokens=budget,
            settings=kind.generation.to_json(),
            text=answer.text,
            num_new_tokens=answer.num_new_tokens,
            cut_off=answer.cut_off,
        )

    def _predictor(self, generation: GenerationSettings, begin: Stage) -> Predictor:
        if generation not in self._predictors:
            begin(f"loading {self._model.folder}")
            model, device = self._loaded
            self._predictors[generation] = Predictor(model, self._processor, batch_size=self._settings.batch_size, settings=generation, device=device)
        return self._predictors[generation]

    @cached_property
    def _loaded(self) -> tuple[ElasticPaliGemmaForConditionalGeneration, str]:
        device = "cuda" if self._settings.gpus_per_actor and torch.cuda.is_available() else "cpu"
        if device == "cpu":
            keep_freed_memory()
            # Ray gives a worker as many threads as it has CPUs, and those of an actor are a share for scheduling.
            torch.set_num_threads(self._settings.threads_per_actor or max(1, (os.cpu_count() or 1) // max(1, self._settings.actors)))
        model = load_vlm(self._folder, dtype=getattr(torch, self._kinds[0].generation.dtype)).eval().to(device)
        use_sdpa_where_exact(model)
        return model, device

    @cached_property
    def _folder(self) -> Path:
        """The checkpoint on this node; one of the hub is fetched once a node, into the shared cache."""
        folder = self._model.folder
        if folder.is_dir():
            return folder
        if not self._model.reference.startswith("hf:"):
            raise UserError(f"{folder} is not on the node {os.uname().nodename}; keep checkpoints on storage that all nodes see, or on the hub.")
        return resolve_checkpoint(self._model.reference).path

    @cached_property
    def _processor(self) -> ElasticPaliGemmaProcessor:
        processor: ElasticPaliGemmaProcessor = ElasticPaliGemmaProcessor.from_pretrained(self._folder)
        return processor


def _alike(missing: dict[int, list[int]]) -> list[tuple[list[int], list[int]]]:
    """Budgets that lack the same samples, and which."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for budget, places in missing.items():
        if places:
            groups.setdefault(tuple(places), []).append(budget)
    return [(budgets, list(places)) for places, budgets in groups.items()]
