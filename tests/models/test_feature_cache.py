"""The feature cache keeps what was used last, within its bytes."""

import torch

from parcelray.evaluation.predict.predictor import EncodedImages
from parcelray.models.feature_cache import FeatureCache


def test_the_least_recently_used_entry_is_evicted() -> None:
    cache = FeatureCache[torch.Tensor](max_bytes=3 * 400)
    for name in "abc":
        cache.put(name, torch.zeros(100))
    assert cache.get("a") is not None
    cache.put("d", torch.zeros(100))
    assert cache.get("b") is None
    assert all(cache.get(name) is not None for name in "acd")
    assert (cache.hits, cache.misses, cache.num_bytes) == (4, 1, 1200)


def test_an_entry_larger_than_the_cache_is_not_kept() -> None:
    cache = FeatureCache[torch.Tensor](max_bytes=1200)
    cache.put("small", torch.zeros(100))
    cache.put("large", torch.zeros(1000))
    assert cache.get("large") is None
    assert cache.get("small") is not None


def test_a_lookup_by_in_does_not_count_as_a_use() -> None:
    cache = FeatureCache[torch.Tensor](max_bytes=800)
    cache.put("a", torch.zeros(100))
    cache.put("b", torch.zeros(100))
    assert "a" in cache
    cache.put("c", torch.zeros(100))
    assert "a" not in cache
    assert (cache.hits, cache.misses) == (0, 0)


def test_images_without_a_view_have_no_size() -> None:
    cache = FeatureCache[EncodedImages](max_bytes=10)
    blind = EncodedImages((), {}, None)
    cache.put("blind", blind)
    assert cache.num_bytes == 0
    assert cache.get("blind") is blind
