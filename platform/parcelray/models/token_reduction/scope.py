"""SCOPE (NeurIPS 2025): patches that cover the other patches, weighted by the attention of the class token."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import (
    Reads,
    Reduction,
    ReductionContext,
    TokenReducer,
    encoder_of,
    selection,
)


@dataclass(frozen=True)
class Scope(TokenReducer):
    """Selects patches greedily by the coverage that they add, times their attention to the power `alpha`.

    Each step takes the patch j with the largest sum_i max(0, cos(i, j) - c_i) * attention_j ** alpha. Here, c_i is the
    largest cosine of patch i with a patch taken so far.

    Args:
        alpha: exponent of the attention.
    """

    alpha: float = 1.0
    name = "scope"

    @property
    def reads(self) -> Reads:
        """Attention and features of the vision tower."""
        return "encoder"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        view = encoder_of(context, self.name)
        directions_BND = F.normalize(view.patch_features_IND.float(), dim=2)
        weights_BN = view.attention_IHN.mean(dim=1) ** self.alpha
        return selection(
            tokens_BND, greedy_cover(directions_BND @ directions_BND.transpose(1, 2), num_visual_tokens, weights_BN)
        )


def greedy_cover(benefits_BRN: Tensor, count: int, weights_BN: Tensor | None = None) -> Tensor:
    """Selects tokens that cover the rows best, by greedy facility location.

    Each step takes the token with the largest gain: the sum over the rows of what the token adds to the row's best
    benefit so far, which starts at 0.

    Args:
        benefits_BRN: benefit of each of N tokens for each of R rows.
        count: number of tokens to select.
        weights_BN: factor of each token's gain; None: 1.

    Returns:
        Positions in ascending order, int64 [B, count]; ties go to the lower position.
    """
    batch, _, num_tokens = benefits_BRN.shape
    covered_BR = torch.zeros_like(benefits_BRN[:, :, 0])
    taken_BN = torch.zeros(batch, num_tokens, dtype=torch.bool, device=benefits_BRN.device)
    images_B = torch.arange(batch, device=benefits_BRN.device)
    for _ in range(count):
        gains_BN = (benefits_BRN - covered_BR[:, :, None]).clamp_(min=0).sum(dim=1)
        if weights_BN is not None:
            gains_BN = gains_BN * weights_BN
        chosen_B = gains_BN.masked_fill(taken_BN, -torch.inf).argmax(dim=1)
        taken_BN[images_B, chosen_B] = True
        covered_BR = torch.maximum(covered_BR, benefits_BRN[images_B, :, chosen_B])
    return taken_BN.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
