"""What a reducer may look at besides the visual tokens themselves."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from parcelray.models.token_reduction.encoder_view import EncoderView


@dataclass(frozen=True)
class PromptView:
    """The prompt and the decoder's attention.

    Shapes: B prompts, T text tokens after the images, V visual tokens now, H heads, L width.
    """

    embeddings_BTL: Tensor
    """Text as it enters the decoder, padding in front."""
    valid_BT: Tensor
    """False: padding."""
    visual_BVL: Tensor
    """All visual tokens as they enter the decoder."""
    attention: Callable[[int], Tensor]
    """From a layer to the attention [B, H, T, V] that text tokens pay to the visual tokens there; rows of padding mean nothing."""
    num_layers: int
    """Of the decoder."""
    grid_side: int
    """Side of the patch grid of an image."""


@dataclass(frozen=True)
class ReductionContext:
    """Everything besides the tokens; a reducer says what it `reads`."""

    encoder: EncoderView | None = None
    """The run of the vision tower that the tokens come from."""
    prompt: PromptView | None = None
    """Prompt and decoder, for reducers that go by the question."""


NO_CONTEXT = ReductionContext()
