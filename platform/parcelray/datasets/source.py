"""Sources of samples: named groups of samples with the same number of images."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from parcelray.datasets.sample import Sample
from parcelray.errors import UserError

_NAMED = 5
"""Number of rows that a message names."""


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
    num_characters: NDArray[np.int32] | None = None
    """Length of the text of each sample; None: unknown, or all are about equal."""


def groups_by_images(
    num_rows: Mapping[int, int], num_characters: Mapping[int, NDArray[np.int32]] | None = None
) -> tuple[SampleGroup, ...]:
    """Returns the groups `images-<n>` of finite data, weighted so that every row is read equally often.

    Args:
        num_rows: number of rows by their number of images; a row without images counts as one image.
        num_characters: lengths of the texts of these rows; None: unknown.
    """
    lengths = num_characters or {}
    sizes = {count: rows * max(1, count) for count, rows in num_rows.items()}
    return tuple(
        SampleGroup(f"images-{count}", count, sizes[count] / sum(sizes.values()), rows, lengths.get(count))
        for count, rows in num_rows.items()
    )


class SampleSource(Protocol):
    """A collection of samples. Instances can be pickled and are cheap to copy to Ray workers.

    `get` may raise `BadRowsError` for a row whose images cannot be read.
    """

    @property
    def groups(self) -> Sequence[SampleGroup]:
        """The groups, in a fixed order."""
        ...

    def get(self, group: str, index: int) -> Sample:
        """Reads sample `index` of a group; the result is the same in every call and process."""
        ...


class BadRowsError(UserError):
    """Rows of the training data that no step can use, and more of them than the data configuration permits.

    Args:
        problems: the reason by row id; not empty.
        limit: largest permitted number of such rows.
    """

    def __init__(self, problems: Mapping[str, str], limit: int = 0) -> None:
        self.problems = dict(problems)
        self.limit = limit
        named = "; ".join(f"{row}: {reason.rstrip('.')}" for row, reason in list(self.problems.items())[:_NAMED])
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        super().__init__(
            f"{len(problems)} {'row' if len(problems) == 1 else 'rows'} of the training data cannot be used: {named}"
            f"{more}. {f'At most {limit} may be skipped (data.max_bad_rows). ' if limit else ''}Fix or remove them."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.problems, self.limit))
