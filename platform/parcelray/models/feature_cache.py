"""A least-recently-used cache of outputs of the vision tower, bounded by bytes.

Evaluation keeps whole batches of encoded images, serving keeps the patch features of single images. The cached values
are computed before the connector, so one entry serves every visual-token budget.
"""

from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

from cachetools import LRUCache


class Sized(Protocol):
    """A value with a size in bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        ...


V = TypeVar("V", bound=Sized)


class FeatureCache(Generic[V]):
    """Evicts the least recently used entries to stay within a number of bytes.

    Args:
        max_bytes: of all entries together; 0 keeps nothing that has a size.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: LRUCache[Hashable, V] = LRUCache(max_bytes, getsizeof=lambda value: value.nbytes)
        self.hits = 0
        self.misses = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries."""
        return int(self._entries.currsize)

    def __contains__(self, key: Hashable) -> bool:
        """Whether an entry exists; does not count as a use."""
        return key in self._entries

    def get(self, key: Hashable) -> V | None:
        """Returns an entry, or None; counts as a use and as a hit or a miss."""
        value = self._entries.get(key)
        if value is None:
            self.misses += 1
        else:
            self.hits += 1
        return value

    def put(self, key: Hashable, value: V) -> None:
        """Stores an entry, unless it is already present or larger than the whole cache."""
        if value.nbytes <= self._entries.maxsize and key not in self._entries:
            self._entries[key] = value
