"""What the vision tower saw, kept for whoever asks about the same images again."""

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

from cachetools import LRUCache

from parcelray.models.token_reduction.encoder_view import EncoderView


class EncodedImages(NamedTuple):
    """Some images, encoded together."""

    images: tuple[bytes, ...]
    """Those that can be decoded, in the order of the view."""
    problems: Mapping[bytes, str]
    """Why the others cannot."""
    view: EncoderView | None
    """None for the blind model, and where no image can be decoded."""


class FeatureCache:
    """Keeps the batches of images that were asked for last, up to a number of bytes.

    Batches are kept whole: a search asks the same questions in the same order, so they come again as they were.

    Args:
        max_bytes: of the tensors that are kept; a batch that alone is larger is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._kept: LRUCache[Hashable, EncodedImages] = LRUCache(max_bytes, getsizeof=_num_bytes)

    @property
    def num_bytes(self) -> int:
        """Of the tensors that are kept."""
        return int(self._kept.currsize)

    def get(self, key: Hashable, encode: Callable[[], EncodedImages]) -> EncodedImages:
        """The batch under a key, encoded now if it is not there."""
        found = self._kept.get(key)
        if found is None:
            found = encode()
            if _num_bytes(found) <= self._kept.maxsize:
                self._kept[key] = found
        return found


def _num_bytes(encoded: EncodedImages) -> int:
    return encoded.view.num_bytes if encoded.view is not None else 0
