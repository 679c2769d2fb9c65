"""Patch features of images seen lately, by content: a picture that comes again skips the vision tower, at whatever budget.

What is kept is what stands before the connector, so one entry serves all budgets.
"""

from collections import OrderedDict

from torch import Tensor


class FeatureCache:
    """The least recently used entries make room.

    Args:
        max_bytes: of all entries together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, content: str) -> Tensor | None:
        """Patch features [N, D] of an image, or None; counts as a use."""
        found = self._entries.get(content)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(content)
        return found

    def put(self, content: str, features_ND: Tensor) -> None:
        """Keeps an image's features, if they fit at all."""
        size = features_ND.nbytes
        if size > self._max_bytes or content in self._entries:
            return
        # A copy: a row of the encoder's batch would keep the whole batch in memory.
        self._entries[content] = features_ND.clone()
        self.bytes += size
        while self.bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.nbytes
