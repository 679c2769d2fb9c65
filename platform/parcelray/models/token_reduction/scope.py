"""SCOPE (NeurIPS 2025): patches that cover the others, weighed by the class token's attention."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import Reads, Reduction, TokenReducer, encoder_of, selection
from parcelray.models.token_reduction.context import ReductionContext
from parcelray.models.token_reduction.coverage import covering


@dataclass(frozen=True)
class Scope(TokenReducer):
    """Greedy: each step takes the patch j with the largest sum over i of max(0, cos(i, j) - best cosine of i so far) times attention_j ** alpha.

    Args:
        alpha: how much the attention counts.
    """

    alpha: float = 1.0
    name = "scope"

    @property
    def reads(self) -> Reads:
        """The vision tower's attention and features."""
        return "encoder"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        view = encoder_of(context, self.name)
        directions_BND = F.normalize(view.patch_features_IND.float(), dim=2)
        weights_BN = view.attention_IHN.mean(dim=1) ** self.alpha
        return selection(
            tokens_BND, covering(directions_BND @ directions_BND.transpose(1, 2), num_visual_tokens, weights_BN)
        )
