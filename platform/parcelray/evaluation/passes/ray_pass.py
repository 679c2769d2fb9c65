"""The evaluation pass on Ray Data: every budget of a checkpoint in one pass over all benchmarks, nothing lost and nothing twice.

read encoded bytes -> keep what the store lacks -> decode and answer at every budget, in actors that hold the model ->
store. A bundle of rows is stored as soon as it is answered, so a pass that was killed computes only what is missing
when it is started again.
"""

import functools
import logging
import os
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
import ray.data
from numpy.typing import NDArray

from parcelray.errors import ParcelrayError, SystemFailure
from parcelray.evaluation.passes.shards import (
    DEFAULT_PASS,
    BenchmarkPass,
    BenchmarkTask,
    Bundle,
    Done,
    EvaluatedModel,
    Kind,
    PassSettings,
    Work,
    collect,
    kinds_of,
    make_bundles,
    opened,
    read_bundle,
    stored_keys,
)

Item = TypeVar("Item")

_READER_BYTES = 256 * 2**20
"""Memory that a reading task reserves."""
_STALL_POLL_S = 1.0
"""Interval at which the clock is compared with `stall_s`."""


def run_pass(
    tasks: Sequence[BenchmarkTask],
    model: EvaluatedModel,
    *,
    settings: PassSettings = DEFAULT_PASS,
    on_progress: Callable[[str, int, int], None] = lambda benchmark, rows, total: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, BenchmarkPass]:
    """Answers benchmarks at every budget and stores the answers; what the store has already is not computed again.

    Samples of the same images in one bundle share one run of the vision tower, over all budgets.

    Args:
        tasks: the benchmarks; their readers travel to the workers.
        model: what answers them.
        settings: use of the cluster.
        on_progress: called with a benchmark, its rows done, and their total.
        clock: time in seconds, which `settings.stall_s` is compared with.

    Returns:
        By benchmark, what was asked and how much was computed.

    Raises:
        SystemFailure: nothing was finished for `settings.stall_s`.
        UserError: the data of a benchmark, or a budget, are not what they should be.
    """
    kinds, bundles = kinds_of(tasks), make_bundles(tasks, settings.rows_per_bundle)
    if not bundles:
        return collect(tasks, (), on_progress)
    with _stage_board() as board:
        pipeline = _pipeline(kinds, model, bundles, ray.put(stored_keys(tasks, model)), settings, board)
        return collect(tasks, _finished(pipeline, len(bundles), settings.stall_s, board, clock), on_progress)


def _pipeline(
    kinds: Sequence[Kind],
    model: EvaluatedModel,
    bundles: Sequence[Bundle],
    present: Any,
    settings: PassSettings,
    board: Any,
) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    # Ray Data logs the stack traces of an error that it raises as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    rows = [{"bundle": pickle.dumps(bundle)} for bundle in bundles]
    # Stages with the same resources would be fused into one, and then the model waits while rows are read.
    read = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Read(kinds, model, present, board),
        batch_size=1,
        num_cpus=0.5,
        memory=_READER_BYTES,
        compute=ray.data.TaskPoolStrategy(size=min(settings.readers, len(rows))),
    )
    return read.map_batches(
        _Answer,
        fn_constructor_args=(kinds, model, settings, board),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(settings.actors, len(rows))),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
    )


def _finished(
    answered: ray.data.Dataset, total: int, stall_s: float, board: Any, clock: Callable[[], float]
) -> Iterator[Done]:
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
            row = _next(finished, stall_s, clock)
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
        done: Done | ParcelrayError = pickle.loads(row["done"])
        if isinstance(done, ParcelrayError):
            raise done
        count += 1
        yield done


def _next(items: queue.Queue[Item], stall_s: float, clock: Callable[[], float]) -> Item:
    """The next item of a queue.

    Raises:
        queue.Empty: none has come for `stall_s` seconds of the clock.
    """
    began = clock()
    while True:
        try:
            return items.get(timeout=_STALL_POLL_S)
        except queue.Empty:
            if clock() - began >= stall_s:
                raise


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

    def __init__(self, kinds: Sequence[Kind], model: EvaluatedModel, present: Any, board: Any) -> None:
        self._kinds = kinds
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

    def _read(self, bundle: Bundle) -> Work:
        kind = self._kinds[bundle.task]
        self._stages.begin(f"reading rows {bundle.rows[0]} to {bundle.rows[-1]} of {kind.name}")
        return read_bundle(
            opened(kind.reader), kind.generation, bundle, self._model, _fetched(self._present)[bundle.task]
        )


@functools.lru_cache(maxsize=1)
def _fetched(present: Any) -> list[frozenset[str]]:
    found: list[frozenset[str]] = ray.get(present)
    return found


class _Answer:
    """An actor with the model."""

    def __init__(self, kinds: Sequence[Kind], model: EvaluatedModel, settings: PassSettings, board: Any) -> None:
        # Here, so that the processes that only read need not load torch.
        from parcelray.evaluation.passes.worker import Answerer

        self._kinds = kinds
        self._answerer = Answerer(model, settings, kinds[0].generation.dtype)
        self._stages = _Stages(board)

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, list[bytes]]:
        work: Work | ParcelrayError = pickle.loads(rows["work"][0])
        try:
            return {"done": [pickle.dumps(work if isinstance(work, ParcelrayError) else self._answer(work))]}
        except ParcelrayError as error:
            return {"done": [pickle.dumps(error)]}
        finally:
            self._stages.end()

    def _answer(self, work: Work) -> Done:
        kind = self._kinds[work.bundle.task]
        return self._answerer.answer(work, kind.name, kind.generation, self._stages.begin)


class _Stages:
    """What a worker does now, for the message of a pass that hangs."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def begin(self, stage: str) -> None:
        """Notes the stage that begins; it ends the one before."""
        self._board.note.remote(f"{os.uname().nodename}/{os.getpid()}", stage)

    def end(self) -> None:
        """Notes that the worker waits."""
        self._board.note.remote(f"{os.uname().nodename}/{os.getpid()}", None)


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
        return (
            "; ".join(stages)
            if stages
            else (
                "nothing, the workers are not up (does the cluster have the CPUs, GPUs and memory that the pass asks"
                " for?)"
            )
        )


@contextmanager
def _stage_board() -> Iterator[Any]:
    board = _StageBoard.remote()  # type: ignore[attr-defined]
    try:
        yield board
    finally:
        ray.kill(board)
