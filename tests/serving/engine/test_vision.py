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
        features_ND = cached.patch_features_ND
        torch.testing.assert_close(features_ND, encoded.images[image.content].patch_features_ND)
        assert features_ND.untyped_storage().nbytes() == features_ND.nbytes == cached.nbytes
