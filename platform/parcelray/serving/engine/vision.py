"""Computes the visual tokens of requests: vision tower once per new image, connector or reducer once per budget.

Shapes: U different images, N patches, D vision width, K visual tokens of an image, L language width.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.feature_cache import FeatureCache
from parcelray.models.model_reducer import ImageTokens, ModelReducer, joined_images
from parcelray.models.token_reduction import Reduction
from parcelray.models.token_reduction.base import unreduced
from parcelray.models.token_reduction.encoder_view import EncoderView
from parcelray.serving.engine.decoder import PatchIds
from parcelray.serving.engine.engine import GenerateRequest, ImagePixels, Inspection


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """The run of the vision tower over one image; it serves every budget."""

    patch_features_ND: Tensor
    """Patch features."""
    view: EncoderView | None = None
    """The run with the layers that a reducer reads; None if none does."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.patch_features_ND.nbytes if self.view is None else self.view.num_bytes

    def copied(self) -> "EncodedImage":
        """Returns an image that does not keep its whole batch in memory; one with a view never does."""
        return self if self.view is not None else EncodedImage(self.patch_features_ND.clone())


class PromptTokens(NamedTuple):
    """The visual tokens of all images of a prompt."""

    tokens_KL: Tensor
    """Projected tokens."""
    patches: PatchIds | None
    """Their patches, for a prompt that the reducer's decoder runs; else None."""


class Encoded(NamedTuple):
    """Some images after the vision tower."""

    images: dict[str, EncodedImage]
    """The images by content."""
    new: frozenset[str]
    """Contents that were not in the cache."""
    seconds: float
    """Duration of the vision-tower batches; 0 if all images were in the cache."""


class VisionStage:
    """Turns images into visual tokens.

    Args:
        model: model in evaluation mode.
        processor: processor of the same checkpoint.
        cache_bytes: size of the cache of encoded images, bytes.
        batch_size: images per run of the vision tower.
        reducer: training-free reducer of the model; None: the model's connector provides the budgets.
    """

    def __init__(
        self,
        model: ElasticVLM,
        processor: ElasticProcessor,
        *,
        cache_bytes: int,
        batch_size: int,
        reducer: ModelReducer | None = None,
    ) -> None:
        self._model = model
        self._processor = processor
        self._batch_size = batch_size
        self._device = model.lm_head.weight.device
        self._reducer = reducer
        self.cache = FeatureCache[EncodedImage](cache_bytes)
        """Encoded images by content; it belongs to one model and one reducer."""

    def encode(self, images: Iterable[ImagePixels]) -> Encoded:
        """Returns each different image after the vision tower, from the cache or computed."""
        started = time.perf_counter()
        found: dict[str, EncodedImage] = {}
        new: dict[str, ImagePixels] = {}
        for image in images:
            if image.content in found or image.content in new:
                continue
            cached = self.cache.get(image.content) if image.use_cache else None
            if cached is None:
                new[image.content] = image
            else:
                found[image.content] = cached
        pending = list(new.values())
        for start in range(0, len(pending), self._batch_size):
            batch = pending[start : start + self._batch_size]
            for image, encoded in zip(batch, self._encode(batch), strict=True):
                found[image.content] = encoded
                if image.use_cache:
                    self.cache.put(image.content, encoded.copied())
        return Encoded(found, frozenset(new), time.perf_counter() - started if new else 0.0)

    def compress(
        self, requests: Sequence[GenerateRequest], images: Mapping[str, EncodedImage]
    ) -> list[PromptTokens | None]:
        """Returns the projected tokens of each request's images, or None for a request without images.

        Args:
            requests: the requests.
            images: their encoded images by content.
        """
        tokens = self._compress(requests, images)
        return [
            self._joined([tokens[image.content, request.num_visual_tokens] for image in request.images], request)
            if request.images
            else None
            for request in requests
        ]

    def _joined(self, tokens: list[ImageTokens], request: GenerateRequest) -> PromptTokens:
        if self._reducer is None or self._reducer.decoder_at(request.num_visual_tokens) is None:
            return PromptTokens(torch.cat([each.tokens_KL for each in tokens]), None)
        tokens_KL, *patches = joined_images(tokens, self._reducer.num_patches)
        return PromptTokens(tokens_KL, PatchIds(*patches))

    def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """Returns the anchors and the attention of the connector for one image at one budget; a reducer has neither."""
        connector = self._model.connector
        if self._reducer is not None:
            return Inspection(anchor_grid=0, grid=connector.grid_size, attention=())
        features_1ND = self.encode([image]).images[image.content].patch_features_ND[None]
        attention_QN = connector.query_attention(features_1ND, num_visual_tokens=num_visual_tokens)[0]
        mean_N = attention_QN.mean(dim=0) if len(attention_QN) else torch.empty(0)
        largest = float(mean_N.max()) if len(mean_N) else 1.0
        return Inspection(
            anchor_grid=math.isqrt(connector.num_anchors(num_visual_tokens)),
            grid=connector.grid_size,
            attention=tuple((mean_N.float() / largest).tolist()),
        )

    def _encode(self, images: list[ImagePixels]) -> list[EncodedImage]:
        pictures = [Image.frombytes("RGB", (image.side, image.side), image.rgb) for image in images]
        pixels = self._processor.normalised(pictures).to(self._device, self._model.dtype)
        if self._reducer is not None and self._reducer.reads_encoder:
            views = EncoderView(self._model.model, pixels).split()
            return [EncodedImage(view.patch_features_IND[0], view) for view in views]
        return [EncodedImage(features_ND) for features_ND in self._model.model.encode_patches(pixels)]

    def _compress(
        self, requests: Sequence[GenerateRequest], images: Mapping[str, EncodedImage]
    ) -> dict[tuple[str, int], ImageTokens]:
        """Returns the tokens by content and budget; equal images at equal budgets are computed once."""
        wanted: dict[int, dict[str, None]] = {}
        for request in requests:
            wanted.setdefault(request.num_visual_tokens, {}).update(
                dict.fromkeys(image.content for image in request.images)
            )
        tokens: dict[tuple[str, int], ImageTokens] = {}
        for budget, contents in wanted.items():
            names = list(contents)
            for start in range(0, len(names), self._batch_size):
                batch = names[start : start + self._batch_size]
                reduction = self._reduced([images[name] for name in batch], budget)
                parts = zip(reduction.tokens_BKD, reduction.position_ids_BK, reduction.sizes_BK, strict=True)
                tokens.update({(name, budget): ImageTokens(*each) for name, each in zip(batch, parts, strict=True)})
        return tokens

    def _reduced(self, images: list[EncodedImage], budget: int) -> Reduction:
        """Returns the tokens of some images at one budget, as they enter the decoder."""
        features_UND = torch.stack([image.patch_features_ND for image in images])
        if self._reducer is None:
            return unreduced(self._model.model.compress(features_UND, num_visual_tokens=budget))
        views = [image.view for image in images if image.view is not None]
        return self._reducer.reduce(features_UND, budget, EncoderView.joined(views) if views else None)
