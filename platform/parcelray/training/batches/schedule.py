"""The samples of each training step, a pure function of seed and step; and the reader of one rank's share.

A step draws one group of the source, so all its samples have the same number of images and cost the same on every rank.
Finite groups are read in seeded permutations, one per epoch; endless groups are read in order. Because nothing depends
on how far a reader has run, a resumed run starts at its step without reading the earlier ones.

Samples of similar length can be grouped in a step. All images of a step have the same number of visual tokens, its
budget, so the lengths of the texts alone decide which samples cost the same, and they are known before a step is read.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from parcelray.datasets.collator import Batch, Collator, PreparedSample
from parcelray.datasets.source import BadRowsError, SampleGroup, SampleSource
from parcelray.errors import UserError

_STEPS_SORTED = 64
"""Number of steps whose samples are sorted together: enough that a step has similar lengths, and few enough that the
samples of a step still differ from epoch to epoch."""


class StepPlan(NamedTuple):
    """The samples of one step, over all ranks."""

    step: int
    group: str
    num_images: int
    """Images per sample."""
    indices: tuple[int, ...]
    """With samples of similar length, the longest first."""

    def share(self, rank: int, world_size: int) -> tuple[int, ...]:
        """The sample indices that one rank reads; together the ranks read each sample of the step once.

        The shares of a step whose samples are sorted by length have about as many tokens each.
        """
        return self.indices[rank::world_size]


class BatchSchedule:
    """Plans the steps of a run.

    Args:
        source: source of the samples.
        num_steps: number of steps of the run.
        images_per_step: images per step over all ranks.
        seed: seed of the order.
        by_tokens: whether the samples of a step have similar length, where the source knows the lengths.
    """

    def __init__(
        self, source: SampleSource, *, num_steps: int, images_per_step: int, seed: int, by_tokens: bool = False
    ) -> None:
        self._groups: list[SampleGroup] = list(source.groups)
        self._seed = seed
        self._by_tokens = by_tokens
        self.images_per_step = images_per_step
        """Largest number of images of a step over all ranks."""
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        """The newest epoch of each group, with its order."""
        too_large = [group for group in self._groups if group.num_images > images_per_step]
        if too_large:
            raise UserError(
                f"training.images_per_step is {images_per_step}, but a sample of {too_large[0].name} has"
                f" {too_large[0].num_images} images; raise it to at least {too_large[0].num_images}."
            )
        weights = np.array([group.weight for group in self._groups])
        rng = np.random.default_rng((seed, 0x5C))
        self._choice = rng.choice(len(self._groups), size=num_steps, p=weights / weights.sum())
        # A sample without images takes the place of one image.
        self._batch = [images_per_step // max(1, group.num_images) for group in self._groups]
        # earlier[g][s]: how many steps before step s drew group g.
        self._earlier = [np.concatenate([[0], np.cumsum(self._choice == g)]) for g in range(len(self._groups))]

    def __len__(self) -> int:
        return len(self._choice)

    def plan(self, step: int) -> StepPlan:
        """The samples of step `step` (0-based)."""
        g = int(self._choice[step])
        group = self._groups[g]
        first = int(self._earlier[g][step]) * self._batch[g]
        positions = range(first, first + self._batch[g])
        return StepPlan(step, group.name, group.num_images, tuple(self._index(g, position) for position in positions))

    def _index(self, g: int, position: int) -> int:
        size = self._groups[g].size
        if size is None:
            return position
        epoch, offset = divmod(position, size)
        if g not in self._orders or self._orders[g][0] != epoch:
            self._orders[g] = (epoch, self._order(g, epoch, size))
        return int(self._orders[g][1][offset])

    def _order(self, g: int, epoch: int, size: int) -> np.ndarray:
        """The samples of a group in the order of an epoch."""
        rng = np.random.default_rng((self._seed, g, epoch))
        order = rng.permutation(size)
        lengths = self._groups[g].num_characters
        if not self._by_tokens or lengths is None:
            return order
        # The first samples may belong to a step that the epoch before has begun.
        per_step = self._batch[g]
        started = -epoch * size % per_step
        for start in range(started, size, _STEPS_SORTED * per_step):
            chunk = order[start : start + _STEPS_SORTED * per_step]
            chunk[:] = chunk[np.argsort(-lengths[chunk], kind="stable")]
            num_steps = len(chunk) // per_step
            whole = chunk[: num_steps * per_step].reshape(num_steps, per_step)
            whole[:] = whole[rng.permutation(num_steps)]
        return order


class StepReader:
    """Reads and collates one rank's share of a step; callable in a Ray task and in the training process.

    Args:
        source: source of the samples.
        schedule: decides which samples each step reads.
        collator: decodes and collates the samples.
        rank: the rank that reads.
        world_size: number of ranks.
        max_skipped: largest number of rows that may be skipped; see `SkippedRows`. The next usable row of the group
            replaces a skipped one. This depends on the data alone, so a resumed run makes the same replacement.
    """

    def __init__(
        self,
        source: SampleSource,
        schedule: BatchSchedule,
        collator: Collator,
        rank: int,
        world_size: int,
        *,
        max_skipped: int = 0,
    ) -> None:
        self._source = source
        self._schedule = schedule
        self._collator = collator
        self._rank = rank
        self._world_size = world_size
        self.max_skipped = max_skipped

    @property
    def num_images(self) -> int:
        """Largest number of images in this rank's share of a step."""
        return -(-self._schedule.images_per_step // self._world_size)

    def read(self, step: int) -> Batch:
        """The collated batch of a step.

        Raises:
            BadRowsError: rows cannot be used and none may replace them, or no row of the group can be used.
        """
        plan = self._schedule.plan(step)
        prepared: list[PreparedSample] = []
        problems: dict[str, str] = {}
        for index in plan.share(self._rank, self._world_size):
            try:
                prepared.append(self._prepared(plan, index))
            except BadRowsError as error:
                problems |= error.problems
                if self.max_skipped:
                    prepared.append(self._replacement(plan, index, problems))
        if not self.max_skipped:
            if problems:
                raise BadRowsError(problems)
            return self._collator.collate(prepared)
        return self._collator.collate(prepared) | {
            "skipped": np.frombuffer(json.dumps(problems).encode(), dtype=np.uint8)
        }

    def _prepared(self, plan: StepPlan, index: int) -> PreparedSample:
        return self._collator.prepare(self._source.get(plan.group, index))

    def _replacement(self, plan: StepPlan, index: int, problems: dict[str, str]) -> PreparedSample:
        """Prepares the next row of the group that can be used, and adds the reasons of those before it."""
        size = next(group.size for group in self._source.groups if group.name == plan.group)
        assert size is not None, "generated rows can all be used"
        for other in range(index + 1, index + size):
            try:
                return self._prepared(plan, other % size)
            except BadRowsError as error:
                problems |= error.problems
        raise BadRowsError(problems)


def in_process_batches(reader: StepReader, first_step: int, num_steps: int) -> Iterator[Batch]:
    """Yield the batches of steps `first_step` to `num_steps` - 1, each made in this process when it is requested."""
    for step in range(first_step, num_steps):
        yield reader.read(step)
