"""Patch features of images seen lately, by content: a picture that comes again skips the vision tower, at whatever budget.

What is kept is what stands before the connector, so one entry serves all budgets.
"""

from cachetools import LRUCache
from torch import Tensor


class FeatureCache:
    """The least recently used entries make room.

    Args:
        max_bytes: of all entries together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: LRUCache[str, Tensor] = LRUCache(max_bytes, getsizeof=lambda features: features.nbytes)
        self.hits = 0
        self.misses = 0

    @property
    def bytes(self) -> int:
        """Of all entries."""
        return int(self._entries.currsize)

    def __contains__(self, content: str) -> bool:
        """Whether an image's features are there; counts as no use."""
        return content in self._entries

    def get(self, content: str) -> Tensor | None:
        """Patch features [N, D] of an image, or None; counts as a use."""
        found = self._entries.get(content)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        return found

    def put(self, content: str, features_ND: Tensor) -> None:
        """Keeps an image's features, if they fit at all."""
        if features_ND.nbytes <= self._entries.maxsize and content not in self._entries:
            # A copy: a row of the encoder's batch would keep the whole batch in memory.
            self._entries[content] = features_ND.clone()
