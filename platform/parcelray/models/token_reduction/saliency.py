"""Selection by saliency: the tokens that some map ranks highest, in an image or its windows, with or without merging the rest.

The maps that arXiv 2504.17892 compares with clustering are not spelled out where they could be read; these are the ones
that published methods use, each said so. `class_attention` is HiRED's selection for one image as well (arXiv
2408.10945).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from parcelray.errors import UserError
from parcelray.models.token_reduction.base import (
    Reads,
    Reduction,
    TokenReducer,
    best,
    best_by_window,
    encoder_of,
    grid_side,
    selection,
)
from parcelray.models.token_reduction.context import PromptView, ReductionContext
from parcelray.models.token_reduction.merging import merged_into, nearest_of

Definition = Literal["class_attention", "last_text", "mean_text", "max_text", "norm"]


@dataclass(frozen=True)
class Saliency(TokenReducer):
    """The K most salient tokens in the order of the grid.

    Args:
        definition: `class_attention`: what the vision tower's class token looks at, summed over heads (without such a
            token: what patches look at on average); `last_text`: what the prompt's last token looks at in a layer of
            the decoder, mean over heads; `mean_text` and `max_text`: the mean or the maximum over all text tokens
            instead; `norm`: the token's own length.
        layer: of the decoder, counted from 0.
        window: side in patches of the windows of the grid that each give their most salient tokens, as many as any
            other or one fewer; None: the whole image competes.
        merge_rest: whether the others are averaged into the kept token with the largest cosine, or dropped.
    """

    definition: Definition = "class_attention"
    layer: int = 2
    window: int | None = None
    merge_rest: bool = False
    name = "saliency"

    @property
    def reads(self) -> Reads:
        """Depends on the definition."""
        if self.definition == "norm":
            return "tokens"
        return "encoder" if self.definition == "class_attention" else "prompt"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        scores_BN = self.scores(tokens_BND, context)
        if self.window is None:
            kept_BK = best(scores_BN, num_visual_tokens)
        else:
            # A prompt may have several images; what looks at no prompt sees one at a time.
            side = grid_side(tokens_BND.shape[1]) if context.prompt is None else context.prompt.grid_side
            kept_BK = best_by_window(scores_BN, num_visual_tokens, side, self.window)
        if self.merge_rest:
            return merged_into(tokens_BND, kept_BK, nearest_of(tokens_BND, kept_BK))
        return selection(tokens_BND, kept_BK)

    def scores(self, tokens_BND: Tensor, context: ReductionContext) -> Tensor:
        """How salient each token is: [B, N], higher is more."""
        if self.definition == "norm":
            norms_BN: Tensor = torch.linalg.vector_norm(tokens_BND.float(), dim=2)
            return norms_BN
        if self.definition == "class_attention":
            return encoder_of(context, self.name).attention_IHN.sum(dim=1)
        prompt = prompt_of(context, self.name)
        if self.layer >= prompt.num_layers:
            raise UserError(
                f"saliency.layer {self.layer} is not in this decoder of {prompt.num_layers} layers; choose 0 to"
                f" {prompt.num_layers - 1}."
            )
        attention_BTN = prompt.attention(self.layer).mean(dim=1)
        if self.definition == "last_text":
            return attention_BTN[:, -1]
        valid_BT1 = prompt.valid_BT[:, :, None]
        if self.definition == "max_text":
            return attention_BTN.masked_fill(~valid_BT1, 0).amax(dim=1)
        means_BN: Tensor = (attention_BTN * valid_BT1).sum(dim=1) / valid_BT1.sum(dim=1)
        return means_BN


def prompt_of(context: ReductionContext, name: str) -> PromptView:
    """Prompt and decoder.

    Raises:
        ValueError: the context has none.
    """
    if context.prompt is None:
        raise ValueError(f"{name} reads the prompt; give it a context with one")
    return context.prompt
