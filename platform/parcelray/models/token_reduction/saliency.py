"""Selection by saliency: keeps the tokens with the highest scores of an image, or of each of its windows.

arXiv 2504.17892 compares clustering with saliency maps, but does not define them in the text that is accessible. The
definitions here are those of published methods. For one image, `class_attention` is also HiRED's selection (arXiv
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
    ReductionContext,
    TokenReducer,
    encoder_of,
    grid_side,
    prompt_of,
    selection,
    top_positions,
    top_positions_by_window,
)
from parcelray.models.token_reduction.merging import merged_into, nearest_of

Definition = Literal["class_attention", "last_text", "mean_text", "max_text", "norm"]


@dataclass(frozen=True)
class Saliency(TokenReducer):
    """Keeps the K most salient tokens, in the order of the grid.

    Args:
        definition: score of a token. `class_attention`: attention of the vision tower's class token, summed over heads
            (without a class token: mean attention of all patches). `last_text`: attention of the prompt's last token in
            a decoder layer, averaged over heads. `mean_text` and `max_text`: mean or maximum over all text tokens
            instead. `norm`: length of the token.
        layer: layer of the decoder, counted from 0.
        window: side in patches of windows that each give the same number of tokens, up to one; None: no windows.
        merge_rest: whether the other tokens are averaged into the kept token with the largest cosine, or dropped.
    """

    definition: Definition = "class_attention"
    layer: int = 2
    window: int | None = None
    merge_rest: bool = False
    name = "saliency"

    @property
    def reads(self) -> Reads:
        """The inputs that `definition` requires."""
        if self.definition == "norm":
            return "tokens"
        return "encoder" if self.definition == "class_attention" else "prompt"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        scores_BN = self.scores(tokens_BND, context)
        if self.window is None:
            kept_BK = top_positions(scores_BN, num_visual_tokens)
        else:
            # A prompt may have several images; without a prompt, each row is one image.
            side = grid_side(tokens_BND.shape[1]) if context.prompt is None else context.prompt.grid_side
            kept_BK = top_positions_by_window(scores_BN, num_visual_tokens, side, self.window)
        if self.merge_rest:
            return merged_into(tokens_BND, kept_BK, nearest_of(tokens_BND, kept_BK))
        return selection(tokens_BND, kept_BK)

    def scores(self, tokens_BND: Tensor, context: ReductionContext) -> Tensor:
        """Returns the saliency of each token, [B, N]; higher is more salient."""
        if self.definition == "norm":
            norms_BN: Tensor = torch.linalg.vector_norm(tokens_BND.float(), dim=2)
            return norms_BN
        if self.definition == "class_attention":
            return encoder_of(context, self.name).attention_IHN.sum(dim=1)
        prompt = prompt_of(context, self.name)
        check_layer(self, prompt.num_layers)
        attention_BTN = prompt.attention(self.layer).mean(dim=1)
        if self.definition == "last_text":
            return attention_BTN[:, -1]
        valid_BT1 = prompt.valid_BT[:, :, None]
        if self.definition == "max_text":
            return attention_BTN.masked_fill(~valid_BT1, 0).amax(dim=1)
        means_BN: Tensor = (attention_BTN * valid_BT1).sum(dim=1) / valid_BT1.sum(dim=1)
        return means_BN


def check_layer(reducer: TokenReducer, num_layers: int) -> None:
    """Raises `UserError` if the reducer is a saliency over text whose layer a decoder of `num_layers` does not have."""
    if isinstance(reducer, Saliency) and reducer.reads == "prompt" and reducer.layer >= num_layers:
        raise UserError(
            f"saliency.layer {reducer.layer} is not a layer of this decoder of {num_layers} layers; choose 0 to"
            f" {num_layers - 1}."
        )
