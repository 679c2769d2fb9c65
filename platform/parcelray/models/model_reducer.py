"""A training-free reducer together with the model that it is applied to: what evaluation and the endpoint share.

Shape suffixes: I images, N patches, D vision width, K visual tokens of an image as they enter the decoder, L width of
the language model.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from parcelray.config.reducer import ReducerConfig
from parcelray.models.backbones import ElasticVLM
from parcelray.models.reduced_decoder import ReducedDecoder
from parcelray.models.token_reduction import Reduction, TokenReducer, build_reducer
from parcelray.models.token_reduction.base import ReductionContext, check_uncompressed, unreduced
from parcelray.models.token_reduction.encoder_view import EncoderView


class ImageTokens(NamedTuple):
    """The visual tokens of one image, or of all images of a prompt, as they enter the decoder."""

    tokens_KL: Tensor
    """Projected tokens."""
    position_ids_K: Tensor
    """Position of each token in the patch grid, counted on from image to image, int64."""
    sizes_K: Tensor
    """Number of patches in each token, int64."""


def joined_images(images: Sequence[ImageTokens], num_patches: int) -> ImageTokens:
    """Joins the visual tokens of a prompt's images.

    Args:
        images: tokens of each image, in the order of the prompt.
        num_patches: number of patches of an image.
    """
    return ImageTokens(
        torch.cat([each.tokens_KL for each in images]),
        torch.cat([each.position_ids_K + number * num_patches for number, each in enumerate(images)]),
        torch.cat([each.sizes_K for each in images]),
    )


class ModelReducer:
    """A reducer and its model.

    Args:
        model: model without compression, in evaluation mode.
        config: configuration of the reducer.

    Raises:
        UserError: the model already compresses.
    """

    def __init__(self, model: ElasticVLM, config: ReducerConfig) -> None:
        check_uncompressed(model.connector)
        self._model = model
        self.reducer: TokenReducer = build_reducer(config)
        self.num_patches = max(model.supported_budgets)
        self.positions_per_image = positions_per_image(config, self.num_patches)
        # Reduced tokens with consecutive positions are like any others to the stock decoder.
        is_stock = self.positions_per_image is None
        self._decoder = None if is_stock else ReducedDecoder(model, self.reducer.positions)

    @cached_property
    def supported_budgets(self) -> tuple[int, ...]:
        """Legal budgets, ascending."""
        return self.reducer.budgets_of(self.num_patches, self._model.config.depths)

    @property
    def needs_decoder(self) -> bool:
        """Whether the stock decoder does not support the reducer."""
        return self._decoder is not None

    @property
    def reads_encoder(self) -> bool:
        """Whether the reducer needs a run of the vision tower with its attention."""
        return self.reducer.reads == "encoder"

    @property
    def in_decoder(self) -> TokenReducer | None:
        """The reducer, if it needs the prompt and is therefore applied by the decoder; else None."""
        return self.reducer if self.reducer.reads == "prompt" else None

    def decoder_at(self, num_visual_tokens: int) -> ReducedDecoder | None:
        """Returns the decoder for a budget; None: the stock decoder, as at the full budget and without images."""
        return self._decoder if 0 < num_visual_tokens < self.num_patches else None

    def reduce(self, patch_features_IND: Tensor, num_visual_tokens: int, encoder: EncoderView | None) -> Reduction:
        """Returns the tokens of images as they enter the decoder: all N if the decoder reduces them.

        Args:
            patch_features_IND: output of the vision tower.
            num_visual_tokens: budget per image.
            encoder: the run of the vision tower; None: the reducer does not read it.

        Raises:
            UnsupportedBudgetError: the reducer does not support the budget.
            NotFiniteError: a token is not finite.
        """
        tokens_INL = self._model.model.compress(patch_features_IND, num_visual_tokens=self.num_patches)
        if self.in_decoder is not None:
            return unreduced(tokens_INL)
        return self.reducer(tokens_INL, num_visual_tokens=num_visual_tokens, context=ReductionContext(encoder=encoder))


def positions_per_image(config: ReducerConfig | None, num_patches: int) -> int | None:
    """Returns the rotary positions that an image takes at every budget; None: one for each visual token.

    Tokens with image positions take those of all patches, and a decoder that reads the prompt starts with all patches.

    Args:
        config: configuration of the reducer; None: no reducer.
        num_patches: number of patches of an image.
    """
    if config is None or (config.positions == "contiguous" and build_reducer(config).reads != "prompt"):
        return None
    return num_patches
