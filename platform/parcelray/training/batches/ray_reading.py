"""Training batches through Ray Data: Ray tasks read, decode, tokenise and collate samples in parallel to the training.

Each rank streams its own share of the schedule. `streaming_split` would give blocks to whichever rank requests them
first, so the order of samples would depend on timing. Here rank r's batch of step s is a pure function of (seed, r, s).
So a resumed run equals an uninterrupted one bit for bit, and starts at any step without reading the earlier ones.

A rank reads in windows of steps: while it trains on one window, the next is prepared. One dataset over all steps would
be simpler. But while it waits for its consumer, its executor polls without a pause (Ray 2.60). In a training process
this takes half of the interpreter's time.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray.data
import ray.exceptions
from numpy.typing import NDArray
from ray.data.dataset import MaterializedDataset

from parcelray.cluster.capacity import DATA_TASK_CPUS
from parcelray.datasets.collator import Batch
from parcelray.datasets.source import BadRowsError
from parcelray.errors import UserError
from parcelray.training.batches.schedule import StepReader

_STEPS_PER_TASK = 8
"""Steps that one Ray task collates: enough to hide a task's fixed cost, few enough that the first batch is early."""
_IMAGES_PER_WINDOW = 2048
"""Largest number of images in one window of a rank; the object store holds two windows (0.3 GB each at 224 pixels)."""


def ray_batches(reader: StepReader, first_step: int, num_steps: int, *, concurrency: int) -> Iterator[Batch]:
    """Yield the batches of steps `first_step` to `num_steps` - 1, prepared by at most `concurrency` Ray tasks."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Otherwise Ray Data replaces the error of a task, which names the bad rows, by its own with a traceback as text.
    context.raise_original_map_exception = True
    with ThreadPoolExecutor(1, thread_name_prefix="parcelray-reading") as ahead:
        following = None
        for window in _windows(first_step, num_steps, reader.num_images):
            current, following = following, ahead.submit(_read_window, reader, window, concurrency)
            if current is not None:
                yield from _batches(current.result())
        if following is not None:
            yield from _batches(following.result())


def _windows(first_step: int, num_steps: int, images_per_step: int) -> Iterator[range]:
    """Yield ranges of steps of growing length, so that the first batch is ready soon."""
    longest = max(2, _IMAGES_PER_WINDOW // images_per_step)
    length = min(_STEPS_PER_TASK, longest)
    while first_step < num_steps:
        window = range(first_step, min(first_step + length, num_steps))
        yield window
        first_step, length = window.stop, min(2 * length, longest)


def _read_window(reader: StepReader, steps: range, concurrency: int) -> MaterializedDataset[Any]:
    blocks = -(-len(steps) // _STEPS_PER_TASK)
    rows = ray.data.range(len(steps), override_num_blocks=blocks)
    read = _ReadSteps(reader, steps.start)
    batches = rows.map_batches(read, batch_size=None, num_cpus=DATA_TASK_CPUS, concurrency=min(concurrency, blocks))
    try:
        dataset: MaterializedDataset[Any] = batches.materialize()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            # Without the traceback of the task, which Ray adds to the message.
            raise error.cause from None
        raise
    return dataset


def _batches(window: MaterializedDataset[Any]) -> Iterator[Batch]:
    for columns in window.iter_batches(batch_size=1, prefetch_batches=2):
        yield {key: np.asarray(column[0]) for key, column in columns.items()}


class _ReadSteps:
    def __init__(self, reader: StepReader, first_step: int) -> None:
        self._reader = reader
        self._first_step = first_step

    def __call__(self, rows: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        batches: list[Batch] = []
        problems: dict[str, str] = {}
        for row in rows["id"]:
            try:
                batches.append(self._reader.read(self._first_step + int(row)))
            except BadRowsError as error:
                problems |= error.problems
        if problems:
            raise BadRowsError(problems)
        return {key: _object_column([batch[key] for batch in batches]) for key in batches[0]}


def _object_column(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    # Steps differ in shape (text length, number of images). So the column holds arrays as objects, which Ray stores as
    # ragged tensors.
    column = np.empty(len(arrays), dtype=object)
    for index, array in enumerate(arrays):
        column[index] = array
    return column
