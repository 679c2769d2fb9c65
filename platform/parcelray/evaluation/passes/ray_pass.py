"""The evaluation pass on Ray Data: every budget of a checkpoint in one pass over all benchmarks, safe against crashes.

The stages are: read encoded bytes; drop what the store already has; decode and predict at every budget, in actors that
hold the model; store. A shard is stored as soon as it is evaluated, so if a pass is killed and started again, it
computes only the missing predictions.
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
from typing import Any, NamedTuple, TypeVar

import ray
import ray.data
from numpy.typing import NDArray

from parcelray.cluster.capacity import DATA_TASK_CPUS, Need, Part, await_capacity
from parcelray.cluster.session import on_this_node
from parcelray.config.evaluate import PassConfig
from parcelray.errors import ParcelrayError, SystemFailure
from parcelray.evaluation.passes.shards import (
    EvaluatedModel,
    OnProgress,
    PassResult,
    PreparedBenchmark,
    Shard,
    ShardInput,
    ShardResult,
    collect,
    dtype_of,
    make_shards,
    read_shard,
    stored_keys,
)
from parcelray.evaluation.passes.store import PredictionStore
from parcelray.files import explained_failure
from parcelray.models.host_cache import DOWNLOADING

Item = TypeVar("Item")

_READER_BYTES = 256 * 2**20
"""Memory that a reading task reserves, bytes."""
_STALL_POLL_S = 1.0
"""Interval at which the clock is compared with `stall_s`, seconds."""


def run_on_ray(
    benchmarks: Sequence[PreparedBenchmark],
    model: EvaluatedModel,
    settings: PassConfig,
    on_progress: OnProgress = lambda benchmark, rows, total: None,
    *,
    say: Callable[[str], object] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> PassResult:
    """Evaluates benchmarks at every budget and stores the predictions; stored predictions are not computed again.

    Samples of one shard that show the same images share one run of the vision tower, over all budgets.

    Args:
        benchmarks: the benchmarks; their readers are sent to the workers.
        model: the model to evaluate.
        settings: use of the cluster.
        on_progress: called after each shard.
        say: called with a sentence if the pass waits for resources, or if a worker died.
        clock: time in seconds, which is compared with `settings.stall_s`.

    Raises:
        SystemFailure: no shard was finished for `settings.stall_s`, or the resources of the pass were not free within
            `settings.wait_s`.
        UserError: the data of a benchmark are damaged, the model does not support a budget, or the cluster can never
            hold the actors.
    """
    shards = make_shards(benchmarks, settings.rows_per_shard)
    dtype = dtype_of(benchmarks)
    if not shards:
        return collect(benchmarks, (), on_progress)
    await_capacity(needed_resources(settings, len(shards)), settings.wait_s, "compute.wait_s", say)
    present = stored_keys(benchmarks, model, PredictionStore(model.store))
    with _stage_actor() as stages:
        reading = ray.put(pickle.dumps(_Reading(tuple(benchmarks), model, present)))
        pipeline = _pipeline(reading, model, dtype, shards, settings, stages)
        finished = _finished(pipeline, len(shards), settings.stall_s, stages, say, clock)
        return collect(benchmarks, finished, on_progress)


def needed_resources(settings: PassConfig, num_shards: int) -> Need:
    """Returns the resources that a pass needs: its actors, and one task that reads rows.

    Without a CPU for that task, actors that hold all CPUs would wait for rows forever.
    """
    actors = min(settings.actors, num_shards)
    return Need(
        "The evaluation",
        (
            Part(actors, "actor", {"CPU": settings.cpus_per_actor, "GPU": settings.gpus_per_actor}),
            Part(1, "data task", {"CPU": DATA_TASK_CPUS}),
        ),
        "lower compute.actors or the resources of each actor",
    )


class _Reading(NamedTuple):
    """The inputs of the reading tasks. Each process unpickles it once, so that a reader opens its files once."""

    benchmarks: tuple[PreparedBenchmark, ...]
    model: EvaluatedModel
    present: list[frozenset[str]]
    """Keys of the stored predictions of each benchmark."""


def _pipeline(
    reading: Any, model: EvaluatedModel, dtype: str, shards: Sequence[Shard], settings: PassConfig, stages: Any
) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    # Ray Data also logs the stack trace of an error that it raises.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    rows = [{"shard": pickle.dumps(shard)} for shard in shards]
    # Ray Data fuses stages with the same resources, and then the model waits while rows are read.
    read = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Read(reading, stages),
        batch_size=1,
        num_cpus=DATA_TASK_CPUS,
        memory=_READER_BYTES,
        compute=ray.data.TaskPoolStrategy(size=min(settings.readers, len(rows))),
    )
    return read.map_batches(
        _Evaluate,
        fn_constructor_args=(model, settings, dtype, stages),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(settings.actors, len(rows))),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
    )


def _finished(
    evaluated: ray.data.Dataset,
    total: int,
    stall_s: float,
    stages: Any,
    say: Callable[[str], object],
    clock: Callable[[], float],
) -> Iterator[ShardResult]:
    """Yields shards as they finish. A thread iterates over the pipeline, so that this process can report a stall."""
    finished: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def take() -> None:
        try:
            for row in evaluated.iter_rows():
                finished.put(row)
            finished.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that called the pass
            finished.put(error)

    show_notices = functools.partial(_show_notices, stages, say)
    executors = _executors(evaluated)
    threading.Thread(target=take, name="parcelray-evaluation", daemon=True).start()
    count = 0
    download = None
    while True:
        try:
            row = _next(finished, stall_s, clock, show_notices)
        except queue.Empty:
            # Before its first shard, a host may have to download the model, which may take longer than a shard.
            before, download = download, ray.get(stages.download.remote())
            if download != before:
                continue
            running = ray.get(stages.running.remote())
            for executor in executors:
                executor.shutdown(force=True)
            raise SystemFailure(
                f"No shard was finished for {stall_s:g} s ({count} of {total} are finished); running stages: {running}."
                " Raise stall_s if a shard takes longer; run the same command again to resume."
            ) from None
        if row is None:
            show_notices()
            return
        if isinstance(row, BaseException):
            raise row
        # Ray wraps the exceptions of workers in its own, so this project's own errors are returned as data.
        result: ShardResult | ParcelrayError = pickle.loads(row["result"])
        if isinstance(result, ParcelrayError):
            raise result
        count += 1
        yield result


def _show_notices(stages: Any, say: Callable[[str], object]) -> None:
    for notice in ray.get(stages.notices.remote()):
        say(notice)


def _next(
    items: queue.Queue[Item], stall_s: float, clock: Callable[[], float], on_poll: Callable[[], None] = lambda: None
) -> Item:
    """Returns the next item of a queue; calls `on_poll` before, and once in each second of waiting.

    Raises:
        queue.Empty: no item arrived for `stall_s` seconds of the clock.
    """
    began = clock()
    while True:
        on_poll()
        try:
            return items.get(timeout=_STALL_POLL_S)
        except queue.Empty:
            if clock() - began >= stall_s:
                raise


def _executors(dataset: ray.data.Dataset) -> list[Any]:
    """Returns a list that will contain the executors of a dataset, as Ray Data cannot stop a pipeline that hangs."""
    create: Callable[[], Any] = dataset._create_executor
    executors: list[Any] = []

    def create_and_keep() -> Any:
        executors.append(create())
        return executors[-1]

    dataset._create_executor = create_and_keep  # type: ignore[method-assign]
    return executors


class _Read:
    """Reads a shard and leaves out the predictions that are stored."""

    def __init__(self, reading: Any, stages: Any) -> None:
        self._reading = reading
        self._stages = _StageReporter(stages)

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, list[bytes]]:
        try:
            return {"input": [pickle.dumps(self._read(pickle.loads(rows["shard"][0])))]}
        except Exception as error:  # noqa: BLE001 - raised again if it has no sentence
            return {"input": [_pickled_failure(error)]}
        finally:
            self._stages.end()

    def _read(self, shard: Shard) -> ShardInput:
        reading = _fetched(self._reading)
        benchmark = reading.benchmarks[shard.benchmark]
        self._stages.begin(f"reading rows {shard.rows[0]} to {shard.rows[-1]} of {benchmark.config.name}")
        return read_shard(shard, benchmark, reading.model, reading.present[shard.benchmark])


@functools.lru_cache(maxsize=1)
def _fetched(reading: Any) -> _Reading:
    # Pickled by us: if Ray itself cannot unpickle an object, the pipeline hangs instead of raising the error.
    found: _Reading = pickle.loads(ray.get(reading))
    return found


class _Evaluate:
    """An actor with the model."""

    def __init__(self, model: EvaluatedModel, settings: PassConfig, dtype: str, stages: Any) -> None:
        # Imported here, so that the processes that only read do not load torch.
        from parcelray.evaluation.passes.worker import ModelWorker

        self._worker = ModelWorker(model, settings, dtype)
        self._stages = _StageReporter(stages)
        self._stages.start()

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, list[bytes]]:
        read: ShardInput | ParcelrayError = pickle.loads(rows["input"][0])
        if isinstance(read, ParcelrayError):
            return {"result": [rows["input"][0]]}
        try:
            return {"result": [pickle.dumps(self._worker.evaluate(read, self._stages.begin))]}
        except Exception as error:  # noqa: BLE001 - raised again if it has no sentence
            return {"result": [_pickled_failure(error)]}
        finally:
            self._stages.end()


def _pickled_failure(error: Exception) -> bytes:
    """Pickles an error that has a sentence for the user, because Ray would wrap it; other errors are raised again."""
    if isinstance(error, ParcelrayError):
        return pickle.dumps(error)
    reason = explained_failure(error)
    if reason is None:
        raise error
    return pickle.dumps(SystemFailure(reason))


class _StageReporter:
    """Reports what a worker does, for the error message of a pass that stalls."""

    def __init__(self, stages: Any) -> None:
        self._stages = stages

    def begin(self, stage: str) -> None:
        """Reports that a stage begins, which ends the previous one."""
        self._stages.report.remote(f"{os.uname().nodename}/{os.getpid()}", stage)

    def end(self) -> None:
        """Reports that the worker is idle."""
        self._stages.report.remote(f"{os.uname().nodename}/{os.getpid()}", None)

    def start(self) -> None:
        """Reports that this actor starts; waits, so that the driver knows it before the actor's first shard."""
        ray.get(self._stages.start.remote(ray.get_runtime_context().get_actor_id(), os.uname().nodename))


@ray.remote(num_cpus=0)
class _StageActor:
    """Holds the current stage of every worker, and notices for the driver."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[float, str]] = {}
        self._actors: set[str] = set()
        self._download: str | None = None
        self._notices: list[str] = []

    def report(self, worker: str, stage: str | None) -> None:
        if stage is None:
            self._running.pop(worker, None)
        else:
            self._running[worker] = (time.monotonic(), stage)
            if stage.startswith(DOWNLOADING):
                self._download = stage

    def start(self, actor: str, host: str) -> None:
        # Ray starts an actor that died again, under the same id.
        if actor in self._actors:
            self._notices.append(f"A worker of the evaluation died; {host} replaces it and computes its shard again.")
        self._actors.add(actor)

    def notices(self) -> list[str]:
        """The sentences since the last call."""
        notices, self._notices = self._notices, []
        return notices

    def download(self) -> str | None:
        return self._download

    def running(self) -> str:
        now = time.monotonic()
        stages = [f"{stage} (for {now - began:.0f} s)" for began, stage in sorted(self._running.values(), reverse=True)]
        return "; ".join(stages) or (
            "none, the workers have not started; check that the cluster has the CPUs, GPUs and memory that the pass"
            " requests"
        )


@contextmanager
def _stage_actor() -> Iterator[Any]:
    stages = _StageActor.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    try:
        yield stages
    finally:
        ray.kill(stages)
