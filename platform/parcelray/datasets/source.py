"""Sources of samples: named groups of samples with the same number of images."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from parcelray.datasets.sample import Sample


class SampleGroup(NamedTuple):
    """A group of samples that can be in one batch, as all have the same number of images."""

    name: str
    """Name of the group within the source."""
    num_images: int
    """Number of images per sample."""
    weight: float
    """Fraction of the training steps that draw from this group; the weights of a source sum to 1."""
    size: int | None
    """Number of samples; None: endless (procedural)."""


class SampleSource(Protocol):
    """A collection of samples. Instances can be pickled and are cheap to copy to Ray workers."""

    @property
    def groups(self) -> Sequence[SampleGroup]:
        """The groups, in a fixed order."""
        ...

    def get(self, group: str, index: int) -> Sample:
        """Reads sample `index` of a group; the result is the same in every call and process."""
        ...
