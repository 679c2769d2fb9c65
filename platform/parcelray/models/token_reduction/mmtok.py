"""MMTok (arXiv 2508.18264): selects visual tokens that cover the words of the prompt and all visual tokens.

The published method covers the visual tokens before the projector. This reducer runs in the decoder, where the prompt
is known but the features of the vision tower are not, so both parts use the projected tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import Reads, Reduction, ReductionContext, TokenReducer, prompt_of, selection
from parcelray.models.token_reduction.scope import greedy_cover

_TEXT_TEMPERATURE, _VISUAL_TEMPERATURE = 0.02, 0.2
_VISUAL_WEIGHT = 0.5


@dataclass(frozen=True)
class MMTok(TokenReducer):
    """Selects tokens by greedy coverage of two kinds of rows: words of the prompt and visual tokens.

    A row is the softmax over the visual tokens of its cosines divided by a temperature. The words have the weight 1 in
    total, the visual tokens 1/2 in total. The output is in the order of the grid.
    """

    name = "mmtok"

    @property
    def reads(self) -> Reads:
        """The prompt: the embeddings of its words."""
        return "prompt"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        prompt = prompt_of(context, self.name)
        directions_BND, words_BTD = (
            F.normalize(tokens_BND.float(), dim=2),
            F.normalize(prompt.embeddings_BTL.float(), dim=2),
        )
        text_BTN = (words_BTD @ directions_BND.transpose(1, 2) / _TEXT_TEMPERATURE).softmax(dim=2)
        visual_BNN = (directions_BND @ directions_BND.transpose(1, 2) / _VISUAL_TEMPERATURE).softmax(dim=2)
        num_words_B11 = prompt.valid_BT.sum(dim=1).clamp(min=1)[:, None, None]
        rows_BRN = torch.cat(
            [text_BTN * prompt.valid_BT[:, :, None] / num_words_B11, _VISUAL_WEIGHT * visual_BNN / tokens_BND.shape[1]],
            dim=1,
        )
        return selection(tokens_BND, greedy_cover(rows_BRN, num_visual_tokens))
