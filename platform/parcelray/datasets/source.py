"""What training and evaluation read from: named groups of samples that have the same number of images."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from parcelray.datasets.sample import Sample


class SampleGroup(NamedTuple):
    """Samples that can share a batch: each has `num_images` images."""

    name: str
    num_images: int
    weight: float
    """Share of the training steps that draw from this group; the weights of a source sum to 1."""
    size: int | None
    """How many samples there are; None: endless (procedural)."""


class SampleSource(Protocol):
    """A readable collection of samples. Instances are picklable and cheap to copy to Ray workers."""

    @property
    def groups(self) -> Sequence[SampleGroup]:
        """The groups, in a fixed order."""
        ...

    def get(self, group: str, index: int) -> Sample:
        """Sample `index` of a group; the same sample each time, in every process."""
        ...
