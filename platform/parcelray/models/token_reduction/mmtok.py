"""MMTok (arXiv 2508.18264): the visual tokens that cover both the words of the prompt and all visual tokens.

Published with the coverage of visual tokens before the projector. This reducer runs where the prompt is known, inside
the decoder's loop, and there are no features of the vision tower there: both parts go by the projected tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import Reads, Reduction, TokenReducer, selection
from parcelray.models.token_reduction.context import ReductionContext
from parcelray.models.token_reduction.coverage import covering
from parcelray.models.token_reduction.saliency import prompt_of

_TEXT_TEMPERATURE, _VISUAL_TEMPERATURE = 0.02, 0.2
_VISUAL_WEIGHT = 0.5


@dataclass(frozen=True)
class MMTok(TokenReducer):
    """Greedy coverage of two kinds of rows, each a softmax over the visual tokens of cosines divided by a temperature.

    A word counts one part of all words, a visual token half of one part of all visual tokens. The output is in the
    order of the grid.
    """

    name = "mmtok"

    @property
    def reads(self) -> Reads:
        """The words' embeddings."""
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
        return selection(tokens_BND, covering(rows_BRN, num_visual_tokens))
