"""Which samples each training step reads: a pure function of seed and step.

A step draws one group of the source, so all its samples have the same number of images and cost the same on every rank.
Finite groups are read in seeded permutations, one per epoch; endless groups are read in order. Because nothing depends
on how far a reader has run, a resumed run starts at its step without reading what came before.
"""

from typing import NamedTuple

import numpy as np

from parcelray.datasets.source import SampleGroup, SampleSource
from parcelray.errors import UserError


class StepPlan(NamedTuple):
    """The samples of one step, over all ranks."""

    step: int
    group: str
    num_images: int
    indices: tuple[int, ...]

    def share(self, rank: int, world_size: int) -> tuple[int, ...]:
        """The indices that one rank reads; the ranks' shares together are the step's samples, each once."""
        return self.indices[rank::world_size]


class BatchSchedule:
    """Plans the steps of a run.

    Args:
        source: what is read.
        num_steps: length of the run.
        images_per_step: images per step over all ranks.
        seed: of the order.
    """

    def __init__(self, source: SampleSource, *, num_steps: int, images_per_step: int, seed: int) -> None:
        self._groups: list[SampleGroup] = list(source.groups)
        self._seed = seed
        self.images_per_step = images_per_step
        """Images of a step over all ranks, at most."""
        self._cached: tuple[tuple[int, int], np.ndarray] | None = None
        too_large = [group for group in self._groups if group.num_images > images_per_step]
        if too_large:
            raise UserError(
                f"training.images_per_step is {images_per_step} but a sample of {too_large[0].name} has"
                f" {too_large[0].num_images} images; raise it."
            )
        weights = np.array([group.weight for group in self._groups])
        rng = np.random.default_rng((seed, 0x5C))
        self._choice = rng.choice(len(self._groups), size=num_steps, p=weights / weights.sum())
        self._batch = [images_per_step // group.num_images for group in self._groups]
        # first[g][s]: how many steps before s drew group g.
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
        return int(self._permutation(g, epoch, size)[offset])

    def _permutation(self, g: int, epoch: int, size: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != (g, epoch):
            self._cached = ((g, epoch), np.random.default_rng((self._seed, g, epoch)).permutation(size))
        return self._cached[1]
