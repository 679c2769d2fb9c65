"""The evaluation pass on Ray Data: every budget of a checkpoint in one pass over all benchmarks, nothing lost and nothing twice.

read encoded bytes -> keep what the store lacks -> decode and answer at every budget, in actors that hold the model -> store. A bundle of
rows is stored as soon as it is answered, so a pass that was killed computes only what is missing when it is started again.
"""

import os
import pickle
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.data
import torch
from numpy.typing import NDArray

from parcelray.benchmarks.reader import BenchmarkReader, Problem
from parcelray.data.sample import Sample
from parcelray.errors import ParcelrayError, SystemFailure
from parcelray.evaluation.generation import GenerationSettings
from parcelray.evaluation.predictor import Answer, Predictor
from parcelray.evaluation.records import Asked, Record, record
from parcelray.evaluation.store import Prediction, PredictionStore, prediction_key
from parcelray.models.processor import ElasticPaliGemmaProcessor
from parcelray.models.vlm import ElasticPaliGemmaForConditionalGeneration, load_vlm, use_sdpa_where_exact
from parcelray.training.allocator import keep_freed_memory


_READER_BYTES = 128 * 2**20
"""Memory that a reading task reserves."""


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
    """Checkpoint, readable on every node."""
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


class _Bundle(NamedTuple):
    number: int
    task: int
    rows: tuple[int, ...]


class _Work(NamedTuple):
    """A bundle that was read."""

    bundle: _Bundle
    records: list[Record]
    problems: list[Problem]
    missing: dict[int, list[int]]
    """By budget, which of the records lack an answer."""
    samples: dict[int, Sample]
    """Those that lack one, by their place among the records."""


class _Done(NamedTuple):
    """A bundle that was answered and stored."""

    bundle: _Bundle
    records: list[Record]
    problems: list[Problem]
    computed: int
    present: int


def run_pass(
    tasks: Sequence[BenchmarkTask],
    model: EvaluatedModel,
    *,
    settings: PassSettings = PassSettings(),
    on_progress: Callable[[str, int, int], None] = lambda benchmark, rows, total: None,
) -> dict[str, BenchmarkPass]:
    """Answers benchmarks at every budget and stores the answers; what the store has already is not computed again.

    Samples of the same images in one bundle share one run of the vision tower, over all budgets.

    Args:
        tasks: the benchmarks; their readers travel to the workers.
        model: what answers them.
        settings: use of the cluster.
        on_progress: called with a benchmark, its rows done, and their total.

    Returns:
        By benchmark, what was asked and how much was computed.

    Raises:
        SystemFailure: nothing was finished for `settings.stall_s`.
        UserError: the data of a benchmark, or a budget, are not what they should be.
    """
    if len({task.generation.dtype for task in tasks}) > 1:
        raise ValueError("the benchmarks of a pass share one copy of the model, so their arithmetic must be the same")
    store = PredictionStore(model.store)
    present = ray.put([store.keys(task.reader.name, model.digest) for task in tasks])
    bundles = _bundles(tasks, settings.rows_per_bundle)
    done: dict[int, list[_Done]] = {number: [] for number in range(len(tasks))}
    totals = {number: len(task.rows) for number, task in enumerate(tasks)}
    if bundles:
        with _stage_board() as board:
            for each in _finished(_pipeline(tasks, model, bundles, present, settings, board), len(bundles), settings.stall_s, board):
                done[each.bundle.task].append(each)
                rows = sum(len(part.bundle.rows) for part in done[each.bundle.task])
                on_progress(tasks[each.bundle.task].reader.name, rows, totals[each.bundle.task])
    return {task.reader.name: _joined(task, done[number]) for number, task in enumerate(tasks)}


def _bundles(tasks: Sequence[BenchmarkTask], size: int) -> list[_Bundle]:
    places = [(number, start) for number, task in enumerate(tasks) for start in range(0, len(task.rows), size)]
    return [_Bundle(index, number, tuple(tasks[number].rows[start : start + size])) for index, (number, start) in enumerate(places)]


def _joined(task: BenchmarkTask, parts: list[_Done]) -> BenchmarkPass:
    parts = sorted(parts, key=lambda done: done.bundle.number)
    records = [each for done in parts for each in done.records]
    problems = [problem for done in parts for problem in done.problems]
    asked = Asked(records, problems, task.reader.pin(), len(task.rows))
    return BenchmarkPass(asked, sum(done.computed for done in parts), sum(done.present for done in parts))


def _pipeline(
    tasks: Sequence[BenchmarkTask], model: EvaluatedModel, bundles: Sequence[_Bundle], present: Any, settings: PassSettings, board: Any
) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"bundle": pickle.dumps(bundle)} for bundle in bundles]
    # Stages with the same resources would be fused into one, and then the model waits while rows are read.
    read = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Read(tasks, model, present, board), batch_size=1, num_cpus=0.5, memory=_READER_BYTES, concurrency=min(settings.readers, len(rows))
    )
    return read.map_batches(
        _Answer,
        fn_constructor_args=(tasks, model, settings, board),
        batch_size=1,
        concurrency=min(settings.actors, len(rows)),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
    )


def _finished(answered: ray.data.Dataset, total: int, stall_s: float, board: Any) -> Iterator[_Done]:
    """The bundles as they finish; a thread takes them, so that a hang of the pipeline does not hang this one too."""
    finished: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def take() -> None:
        try:
            for row in answered.iter_rows():
                finished.put(row)
            finished.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where the pass was called
            finished.put(error)

    executors = _executors(answered)
    threading.Thread(target=take, name="parcelray-evaluation", daemon=True).start()
    count = 0
    while True:
        try:
            row = finished.get(timeout=stall_s)
        except queue.Empty:
            stages = ray.get(board.running.remote())
            for executor in executors:
                executor.shutdown(force=True)
            raise SystemFailure(
                f"No bundle was finished for {stall_s:g} s ({count} of {total} are); what runs is: {stages}. "
                "Raise stall_s if it needs longer; start the same command again to go on."
            ) from None
        if row is None:
            return
        if isinstance(row, BaseException):
            raise row
        # What a worker raises reaches us wrapped in Ray's words, so our own errors travel as data.
        done: _Done | ParcelrayError = pickle.loads(row["done"])
        if isinstance(done, ParcelrayError):
            raise done
        count += 1
        yield done


def _executors(dataset: ray.data.Dataset) -> list[Any]:
    """A list that will hold what runs the pipeline: Ray Data has no call that ends a pipeline which hangs."""
    create: Callable[[], Any] = dataset._create_executor
    executors: list[Any] = []

    def create_and_keep() -> Any:
        executors.append(create())
        return executors[-1]

    dataset._create_executor = create_and_keep  # type: ignore[method-assign]
    return executors


class _Read:
    """Reads a bundle and leaves out what the store has."""

    def __init__(self, tasks: Sequence[BenchmarkTask], model: EvaluatedModel, present: Any, board: Any) -> None:
        self._tasks = tasks
        self._model = model
        self._present = present
        self._stages = _Stages(board)

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, list[bytes]]:
        try:
            return {"work": [pickle.dumps(self._read(pickle.loads(rows["bundle"][0])))]}
        except ParcelrayError as error:
            return {"work": [pickle.dumps(error)]}
        finally:
            self._stages.end()

    def _read(self, bundle: _Bundle) -> _Work:
        task = self._tasks[bundle.task]
        self._stages.begin(f"reading rows {bundle.rows[0]} to {bundle.rows[-1]} of {task.reader.name}")
        present: frozenset[str] = ray.get(self._present)[bundle.task]
        work = _Work(bundle, [], [], {budget: [] for budget in self._model.budgets}, {})
        for row in bundle.rows:
            found = task.reader.read(row)
            work.problems.extend(found.problems)
            for sample in found.samples:
                keys = {
                    budget: prediction_key(sample, model=self._model.digest, num_visual_tokens=budget, settings=task.generation)
                    for budget in self._model.budgets
                }
                for budget, key in keys.items():
                    if key not in present:
                        work.missing[budget].append(len(work.records))
                        work.samples[len(work.records)] = sample
                work.records.append(record(sample, keys))
        return work


class _Answer:
    """Holds the model, from the first bundle that needs it on."""

    def __init__(self, tasks: Sequence[BenchmarkTask], model: EvaluatedModel, settings: PassSettings, board: Any) -> None:
        self._tasks = tasks
        self._model = model
        self._settings = settings
        self._stages = _Stages(board)
        self._store = PredictionStore(model.store)
        self._predictors: dict[GenerationSettings, Predictor] = {}

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, list[bytes]]:
        work: _Work | ParcelrayError = pickle.loads(rows["work"][0])
        try:
            return {"done": [pickle.dumps(work if isinstance(work, ParcelrayError) else self._answer(work))]}
        except ParcelrayError as error:
            return {"done": [pickle.dumps(error)]}
        finally:
            self._stages.end()

    def _answer(self, work: _Work) -> _Done:
        task = self._tasks[work.bundle.task]
        unreadable: dict[str, str] = {}
        computed = 0
        # Mostly every budget lacks the same samples; budgets that do share one encoding of their images.
        for budgets, places in _alike(work.missing):
            samples = [work.samples[place] for place in places]
            self._begin(task, samples, budgets)
            answers = self._predictor(task.generation).answer_budgets(samples, budgets)
            found = [
                self._prediction(task, work.records[place], budget, answer)
                for budget in budgets
                for place, answer in zip(places, answers[budget], strict=True)
                if not answer.problem
            ]
            unreadable |= {sample.id: answer.problem for sample, answer in zip(samples, answers[budgets[0]], strict=True) if answer.problem}
            self._stages.begin(f"storing {len(found)} answers on {task.reader.name}")
            self._store.write(found)
            computed += len(found)
        records = [each for each in work.records if each.sample.id not in unreadable]
        problems = [*work.problems, *(Problem(name, reason) for name, reason in unreadable.items())]
        present = len(work.records) * len(work.missing) - sum(map(len, work.missing.values()))
        return _Done(work.bundle, records, problems, computed, present)

    def _begin(self, task: BenchmarkTask, samples: Sequence[Sample], budgets: Sequence[int]) -> None:
        self._stages.begin(
            f"answering samples {samples[0].id} to {samples[-1].id} of {task.reader.name} at {', '.join(map(str, budgets))} visual tokens"
        )

    def _prediction(self, task: BenchmarkTask, asked: Record, budget: int, answer: Answer) -> Prediction:
        return Prediction(
            key=asked.keys[budget],
            benchmark=task.reader.name,
            sample_id=asked.sample.id,
            model=self._model.digest,
            num_visual_tokens=budget,
            settings=task.generation.to_json(),
            text=answer.text,
            num_new_tokens=answer.num_new_tokens,
            cut_off=answer.cut_off,
        )

    def _predictor(self, generation: GenerationSettings) -> Predictor:
        if generation not in self._predictors:
            model, device = self._loaded
            self._predictors[generation] = Predictor(model, self._processor, batch_size=self._settings.batch_size, settings=generation, device=device)
        return self._predictors[generation]

    @cached_property
    def _loaded(self) -> tuple[ElasticPaliGemmaForConditionalGeneration, str]:
        self._stages.begin(f"loading {self._model.folder}")
        device = "cuda" if self._settings.gpus_per_actor and torch.cuda.is_available() else "cpu"
        if device == "cpu":
            keep_freed_memory()
            # Ray gives a worker as many threads as it has CPUs, and those of an actor are a share for scheduling.
            torch.set_num_threads(self._settings.threads_per_actor or max(1, (os.cpu_count() or 1) // self._settings.actors))
        model = load_vlm(self._model.folder, dtype=getattr(torch, self._tasks[0].generation.dtype)).eval().to(device)
        use_sdpa_where_exact(model)
        return model, device

    @cached_property
    def _processor(self) -> ElasticPaliGemmaProcessor:
        return ElasticPaliGemmaProcessor.from_pretrained(self._model.folder)


def _alike(missing: dict[int, list[int]]) -> list[tuple[list[int], list[int]]]:
    """Budgets that lack the same samples, and which."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for budget, places in missing.items():
        if places:
            groups.setdefault(tuple(places), []).append(budget)
    return [(budgets, list(places)) for places, budgets in groups.items()]


class _Stages:
    """What a worker does now, for the message of a pass that hangs."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._worker = uuid.uuid4().hex

    def begin(self, stage: str) -> None:
        """Notes the stage that begins; it ends the one before."""
        self._board.note.remote(self._worker, stage)

    def end(self) -> None:
        """Notes that the worker waits."""
        self._board.note.remote(self._worker, None)


@ray.remote(num_cpus=0)
class _StageBoard:
    """What every worker does now."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[float, str]] = {}

    def note(self, worker: str, stage: str | None) -> None:
        if stage is None:
            self._running.pop(worker, None)
        else:
            self._running[worker] = (time.monotonic(), stage)

    def running(self) -> str:
        now = time.monotonic()
        stages = [f"{stage} (for {now - began:.0f} s)" for began, stage in sorted(self._running.values(), reverse=True)]
        return "; ".join(stages) if stages else "nothing, the workers are not up (does the cluster have the CPUs, GPUs and memory that the pass asks for?)"


@contextmanager
def _stage_board() -> Iterator[Any]:
    board = _StageBoard.remote()  # type: ignore[attr-defined]
    try:
        yield board
    finally:
        ray.kill(board)
