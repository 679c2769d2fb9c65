"""SCOPE (NeurIPS 2025): patches that cover the others, weighed by the class token's attention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import Reads, Reduction, TokenReducer, encoder_of, selection
from parcelray.models.token_reduction.context import ReductionContext


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
        cosine_BNN = directions_BND @ directions_BND.transpose(1, 2)
        weights_BN = view.attention_IHN.mean(dim=1) ** self.alpha
        covered_BN = torch.zeros_like(weights_BN)
        taken_BN = torch.zeros_like(weights_BN, dtype=torch.bool)
        images_B = torch.arange(len(weights_BN), device=weights_BN.device)
        for _ in range(num_visual_tokens):
            gains_BN = (cosine_BNN - covered_BN[:, :, None]).clamp_(min=0).sum(dim=1) * weights_BN
            chosen_B = gains_BN.masked_fill(taken_BN, -torch.inf).argmax(dim=1)
            taken_BN[images_B, chosen_B] = True
            covered_BN = torch.maximum(covered_BN, cosine_BNN[images_B, chosen_B])
        kept_BK = taken_BN.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :num_visual_tokens]
        return selection(tokens_BND, kept_BK)
