"""Computes the visual tokens of a batch of requests: vision tower once per new image, connector once per budget.

Shapes: U different images, N patches, D vision width, K visual tokens of an image, L language width.
"""

import math
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.feature_cache import FeatureCache
from parcelray.serving.engine.engine import GenerateRequest, ImagePixels, Inspection


class Encoded(NamedTuple):
    """Patch features of some images."""

    features: dict[str, Tensor]
    """Patch features [N, D] by content."""
    new: frozenset[str]
    """Contents that were not in the cache."""
    seconds: float
    """Duration of the vision-tower batches; 0 if all images were in the cache."""


class VisionStage:
    """Turns images into visual tokens.

    Args:
        model: model in evaluation mode.
        processor: processor of the same checkpoint.
        cache_bytes: size of the cache of patch features, bytes.
        batch_size: images per run of the vision tower.
    """

    def __init__(self, model: ElasticVLM, processor: ElasticProcessor, *, cache_bytes: int, batch_size: int) -> None:
        self._model = model
        self._processor = processor
        self._batch_size = batch_size
        self._device = model.lm_head.weight.device
        self.cache = FeatureCache[Tensor](cache_bytes)

    def encode(self, images: Iterable[ImagePixels]) -> Encoded:
        """Returns the patch features of each different image, from the cache or from the vision tower."""
        started = time.perf_counter()
        features: dict[str, Tensor] = {}
        new: dict[str, ImagePixels] = {}
        for image in images:
            if image.content in features or image.content in new:
                continue
            cached = self.cache.get(image.content) if image.use_cache else None
            if cached is None:
                new[image.content] = image
            else:
                features[image.content] = cached
        pending = list(new.values())
        for start in range(0, len(pending), self._batch_size):
            batch = pending[start : start + self._batch_size]
            for image, features_ND in zip(batch, self._encode(batch), strict=True):
                features[image.content] = features_ND
                if image.use_cache:
                    # A copy: a row of the encoder's batch would keep the whole batch in memory.
                    self.cache.put(image.content, features_ND.clone())
        return Encoded(features, frozenset(new), time.perf_counter() - started if new else 0.0)

    def compress(self, requests: Sequence[GenerateRequest], features: dict[str, Tensor]) -> list[Tensor | None]:
        """Returns each request's projected tokens [K of all images, L], or None for a request without images."""
        tokens = self._compress(requests, features)
        return [
            (
                torch.cat([tokens[image.content, request.num_visual_tokens] for image in request.images])
                if request.images
                else None
            )
            for request in requests
        ]

    def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """Returns the anchors and the attention of the connector for one image at one budget."""
        connector = self._model.connector
        features_1ND = self.encode([image]).features[image.content][None]
        attention_QN = connector.query_attention(features_1ND, num_visual_tokens=num_visual_tokens)[0]
        mean_N = attention_QN.mean(dim=0) if len(attention_QN) else torch.empty(0)
        largest = float(mean_N.max()) if len(mean_N) else 1.0
        return Inspection(
            anchor_grid=math.isqrt(connector.num_anchors(num_visual_tokens)),
            grid=connector.grid_size,
            attention=tuple((mean_N.float() / largest).tolist()),
        )

    def _encode(self, images: list[ImagePixels]) -> Tensor:
        pictures = [Image.frombytes("RGB", (image.side, image.side), image.rgb) for image in images]
        pixels = self._processor.normalised(pictures).to(self._device, self._model.dtype)
        return self._model.model.encode_patches(pixels)

    def _compress(
        self, requests: Sequence[GenerateRequest], features: dict[str, Tensor]
    ) -> dict[tuple[str, int], Tensor]:
        """Returns the tokens [K, L] by content and budget; equal images at equal budgets are computed once."""
        wanted: dict[int, dict[str, None]] = {}
        for request in requests:
            wanted.setdefault(request.num_visual_tokens, {}).update(
                dict.fromkeys(image.content for image in request.images)
            )
        tokens: dict[tuple[str, int], Tensor] = {}
        for budget, contents in wanted.items():
            names = list(contents)
            for start in range(0, len(names), self._batch_size):
                batch = names[start : start + self._batch_size]
                tokens_UKL = self._model.model.compress(
                    torch.stack([features[name] for name in batch]), num_visual_tokens=budget
                )
                tokens.update({(name, budget): tokens_KL for name, tokens_KL in zip(batch, tokens_UKL, strict=True)})
        return tokens
