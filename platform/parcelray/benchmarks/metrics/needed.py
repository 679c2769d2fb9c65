"""Metadata that a metric cannot do without."""

from typing import TypeVar

from parcelray.datasets.sample import Sample
from parcelray.errors import UserError

T = TypeVar("T")


def needed(sample: Sample, key: str, kind: type[T], metric: str) -> T:
    """A sample's metadata under a key.

    Raises:
        UserError: it is missing, or of another type.
    """
    value = sample.metadata.get(key)
    if not isinstance(value, kind):
        raise UserError(
            f"The metric {metric} needs metadata {key!r} ({kind.__name__}) on every sample, but sample {sample.id!r} of"
            f" {sample.benchmark} has {value!r}; give the benchmark a column for {key!r}, or choose another metric."
        )
    return value
