"""Training batches through Ray Data: samples are made or read, decoded, tokenised and collated in Ray tasks, beside the training.

Each rank streams its own share of the schedule. `streaming_split` would hand blocks to whichever rank asks first, so that the order
of samples depended on timing; here rank r's batch of step s is a pure function of (seed, r, s), which is what makes a resumed run equal
to an undisturbed one bit for bit, and lets it start at any step without reading what came before.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray

from parcelray.data.collator import Batch
from parcelray.data.reading import StepReader

_STEPS_PER_TASK = 8
"""Steps that one Ray task collates: enough to hide a task's fixed cost, few enough to start early."""


def ray_batches(reader: StepReader, first_step: int, num_steps: int, *, concurrency: int) -> Iterator[Batch]:
    """The reader's batches from step `first_step` on, made by at most `concurrency` Ray tasks ahead of their use, and streamed in order."""
    if first_step >= num_steps:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    steps = num_steps - first_step
    blocks = -(-steps // _STEPS_PER_TASK)
    dataset = ray.data.range(steps, override_num_blocks=blocks).map_batches(
        _ReadSteps(reader, first_step), batch_size=None, num_cpus=0.5, concurrency=concurrency
    )
    yield from _rows(dataset.iter_batches(batch_size=1, prefetch_batches=4))


class _ReadSteps:
    def __init__(self, reader: StepReader, first_step: int) -> None:
        self._reader = reader
        self._first_step = first_step

    def __call__(self, rows: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        batches = [self._reader.read(self._first_step + int(row)) for row in rows["id"]]
        return {key: _object_column([batch[key] for batch in batches]) for key in batches[0]}


def _rows(batches: Iterable[Any]) -> Iterator[Batch]:
    for columns in batches:
        yield {key: np.asarray(column[0]) for key, column in columns.items()}


def _object_column(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    # Steps differ in shape (text length, images), so the column holds arrays as objects and Ray stores them as ragged tensors.
    column = np.empty(len(arrays), dtype=object)
    for index, array in enumerate(arrays):
        column[index] = array
    return column
