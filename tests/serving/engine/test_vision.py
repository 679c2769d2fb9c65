"""Tests of how images become visual tokens."""

import torch

from parcelray.datasets.sample import Sample
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.vision import VisionStage
from tests.serving.conftest import Asker


def test_cached_features_do_not_keep_their_whole_batch_in_memory(
    model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample], ask: Asker
) -> None:
    stage = VisionStage(model, processor, cache_bytes=2**24, batch_size=8)
    images = [ask(sample, 16).images[0] for sample in samples[:4]]
    with torch.inference_mode():
        encoded = stage.encode(images)
    for image in images:
        cached = stage.cache.get(image.content)
        assert cached is not None
        torch.testing.assert_close(cached, encoded.features[image.content])
        assert cached.untyped_storage().nbytes() == cached.nbytes
