"""The cache keeps what was asked for last, within its bytes."""

from types import SimpleNamespace
from typing import Any, cast

from parcelray.evaluation.predict.feature_cache import EncodedImages, FeatureCache


def _images(num_bytes: int) -> EncodedImages:
    return EncodedImages((b"image",), {}, cast(Any, SimpleNamespace(num_bytes=num_bytes)))


def test_the_oldest_goes_first_and_what_is_asked_for_is_new() -> None:
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


def test_what_is_too_large_is_not_kept_and_the_blind_cost_nothing() -> None:
    cache = FeatureCache(10)
    assert cache.get("large", lambda: _images(11)).view is not None
    cache.get("blind", lambda: EncodedImages((), {}, None))
    assert cache.num_bytes == 0
