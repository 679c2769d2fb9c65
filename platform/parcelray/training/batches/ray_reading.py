"""Training batches through Ray Data: samples are made or read, decoded, tokenised and collated in Ray tasks, beside the training.

Each rank streams its own share of the schedule. `streaming_split` would hand blocks to whichever rank asks first, so
that the order of samples depended on timing; here rank r's batch of step s is a pure function of (seed, r, s), which is
what makes a resumed run equal to an undisturbed one bit for bit, and lets it start at any step without reading what
came before.

A rank reads in windows of steps: while one is trained on, the next is made. One dataset over all steps would be
simpler, but as soon as it is so far ahead that it must wait for its consumer, its executor polls without a pause (Ray
2.60), and in a training process that poll takes half of the interpreter.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data.dataset import MaterializedDataset

from parcelray.datasets.collator import Batch
from parcelray.training.batches.reading import StepReader

_STEPS_PER_TASK = 8
"""Steps that one Ray task collates: enough to hide a task's fixed cost, few enough to start early."""
_IMAGES_PER_WINDOW = 2048
"""Images of a rank that lie ready in the object store, of the window in use and of the next alike: 0.3 GB at 224 pixels."""


def ray_batches(reader: StepReader, first_step: int, num_steps: int, *, concurrency: int) -> Iterator[Batch]:
    """The reader's batches from step `first_step` on, in order, made ahead of their use by at most `concurrency` Ray tasks."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with ThreadPoolExecutor(1, thread_name_prefix="parcelray-reading") as ahead:
        coming = None
        for window in _windows(first_step, num_steps, reader.num_images):
            current, coming = coming, ahead.submit(_make, reader, window, concurrency)
            if current is not None:
                yield from _batches(current.result())
        if coming is not None:
            yield from _batches(coming.result())


def _windows(first_step: int, num_steps: int, images_per_step: int) -> Iterator[range]:
    """Ranges of steps, of growing length, so that the first is there soon."""
    longest = max(2, _IMAGES_PER_WINDOW // images_per_step)
    length = min(_STEPS_PER_TASK, longest)
    while first_step < num_steps:
        window = range(first_step, min(first_step + length, num_steps))
        yield window
        first_step, length = window.stop, min(2 * length, longest)


def _make(reader: StepReader, steps: range, concurrency: int) -> MaterializedDataset[Any]:
    blocks = -(-len(steps) // _STEPS_PER_TASK)
    rows = ray.data.range(len(steps), override_num_blocks=blocks)
    read = _ReadSteps(reader, steps.start)
    made: MaterializedDataset[Any] = rows.map_batches(
        read, batch_size=None, num_cpus=0.5, concurrency=min(concurrency, blocks)
    ).materialize()
    return made


def _batches(window: MaterializedDataset[Any]) -> Iterator[Batch]:
    for columns in window.iter_batches(batch_size=1, prefetch_batches=2):
        yield {key: np.asarray(column[0]) for key, column in columns.items()}


class _ReadSteps:
    def __init__(self, reader: StepReader, first_step: int) -> None:
        self._reader = reader
        self._first_step = first_step

    def __call__(self, rows: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        batches = [self._reader.read(self._first_step + int(row)) for row in rows["id"]]
        return {key: _object_column([batch[key] for batch in batches]) for key in batches[0]}


def _object_column(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    # Steps differ in shape (text length, images), so the column holds arrays as objects and Ray stores them as ragged
    # tensors.
    column = np.empty(len(arrays), dtype=object)
    for index, array in enumerate(arrays):
        column[index] = array
    return column
