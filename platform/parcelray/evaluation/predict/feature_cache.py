"""A cache of patch features, for repeated evaluations of the same images."""

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

from cachetools import LRUCache

from parcelray.models.token_reduction.encoder_view import EncoderView


class EncodedImages(NamedTuple):
    """A batch of encoded images."""

    images: tuple[bytes, ...]
    """The images that can be decoded, in the order of the view."""
    problems: Mapping[bytes, str]
    """The reason for each image that cannot be decoded."""
    view: EncoderView | None
    """None for the blind baseline, and if no image can be decoded."""


class FeatureCache:
    """An LRU cache of batches of encoded images, limited by its size in bytes.

    Batches are cached as a whole, because a search evaluates the same samples in the same order each time.

    Args:
        max_bytes: largest total size of the cached tensors; a batch that alone is larger is not cached.
    """

    def __init__(self, max_bytes: int) -> None:
        self._kept: LRUCache[Hashable, EncodedImages] = LRUCache(max_bytes, getsizeof=_num_bytes)

    @property
    def num_bytes(self) -> int:
        """Total size of the cached tensors."""
        return int(self._kept.currsize)

    def get(self, key: Hashable, encode: Callable[[], EncodedImages]) -> EncodedImages:
        """Returns the batch under a key; encodes it first on a cache miss."""
        found = self._kept.get(key)
        if found is None:
            found = encode()
            if _num_bytes(found) <= self._kept.maxsize:
                self._kept[key] = found
        return found


def _num_bytes(encoded: EncodedImages) -> int:
    return encoded.view.num_bytes if encoded.view is not None else 0
