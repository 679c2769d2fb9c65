"""The cache keeps the batches that were used last, within its size limit."""

from types import SimpleNamespace
from typing import Any, cast

from parcelray.evaluation.predict.feature_cache import EncodedImages, FeatureCache


def _images(num_bytes: int) -> EncodedImages:
    return EncodedImages((b"image",), {}, cast(Any, SimpleNamespace(num_bytes=num_bytes)))


def test_the_least_recently_used_batch_is_evicted() -> None:
    cache = FeatureCache(100)
    encoded: list[str] = []

    def get(key: str, num_bytes: int = 40) -> EncodedImages:
        def encode() -> EncodedImages:
            encoded.append(key)
            return _images(num_bytes)

        return cache.get(key, encode)

    first = get("a")
    get("b")
    assert get("a") is first
    get("c")
    assert cache.num_bytes == 80
    get("a")
    get("b")
    assert encoded == ["a", "b", "c", "b"]


def test_a_too_large_batch_is_not_kept_and_a_blind_batch_has_no_size() -> None:
    cache = FeatureCache(10)
    assert cache.get("large", lambda: _images(11)).view is not None
    cache.get("blind", lambda: EncodedImages((), {}, None))
    assert cache.num_bytes == 0
