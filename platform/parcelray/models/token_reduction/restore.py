"""RESTORE (ICML 2026, arXiv 2606.01711): half of the budget is selected, the other half merged from the rest.

The merged anchors represent whole groups. The default of `positions` is therefore `image_calibrated`: image
positions, with attention logits calibrated for group size and distance.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.config.reducer import Positions
from parcelray.models.token_reduction.base import (
    Reads,
    Reduction,
    ReductionContext,
    TokenReducer,
    encoder_of,
    gather_tokens,
    other_positions,
    top_positions,
)
from parcelray.models.token_reduction.divprune import most_different
from parcelray.models.token_reduction.kmeans import cluster_sums
from parcelray.models.token_reduction.merging import sorted_by_position


@dataclass(frozen=True)
class Restore(TokenReducer):
    """Selects a part of the tokens by another method and merges the rest into anchors.

    Let C_ij be the cosines of the rest and R_i = sum_j C_ij. The anchors are the patches with the largest
    R_i * (1 - max C_ij over j with R_j > R_i). Every other patch of the rest is averaged into the anchor with the
    largest cosine.

    Args:
        positions: see `TokenReducer`.
        base: method that selects the first part: `divprune`, or `class_attention` (the saliency used by pruners of the
            vision tower).
        share: share of the budget that the base selects.
    """

    positions: Positions = "image_calibrated"
    base: Literal["divprune", "class_attention"] = "divprune"
    share: float = 0.5
    name = "restore"

    @property
    def reads(self) -> Reads:
        """The vision tower for the base `class_attention`, otherwise only the tokens."""
        return "encoder" if self.base == "class_attention" else "tokens"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        num_tokens = tokens_BND.shape[1]
        num_chosen = num_selected(self.share, num_visual_tokens)
        if num_chosen == 0:
            chosen_BM = torch.zeros(tokens_BND.shape[0], 0, dtype=torch.int64, device=tokens_BND.device)
        elif self.base == "divprune":
            chosen_BM = most_different(tokens_BND, num_chosen)
        else:
            chosen_BM = top_positions(encoder_of(context, self.name).attention_IHN.mean(dim=1), num_chosen)
        rest_BR = other_positions(chosen_BM, num_tokens)
        rest_BRD = gather_tokens(tokens_BND, rest_BR).float()
        directions_BRD = F.normalize(rest_BRD, dim=2)
        cosine_BRR = directions_BRD @ directions_BRD.transpose(1, 2)
        density_BR = cosine_BRR.sum(dim=2)
        denser_BRR = density_BR[:, None, :] > density_BR[:, :, None]
        nearest_BR = cosine_BRR.masked_fill(~denser_BRR, -torch.inf).amax(dim=2)
        # The densest patch has no denser neighbour and is always an anchor.
        scores_BR = torch.where(denser_BRR.any(dim=2), density_BR * (1 - nearest_BR), torch.inf)
        num_anchors = num_visual_tokens - num_chosen
        anchors_BA = top_positions(scores_BR, num_anchors)
        numbers_BA = torch.arange(num_anchors, device=anchors_BA.device).expand_as(anchors_BA)
        joined_BR = (
            cosine_BRR.gather(2, anchors_BA[:, None].expand(-1, cosine_BRR.shape[1], -1))
            .argmax(dim=2)
            .scatter_(1, anchors_BA, numbers_BA)
        )
        sizes_BA = torch.zeros_like(anchors_BA).scatter_add_(1, joined_BR, torch.ones_like(joined_BR))
        means_BAD = (cluster_sums(rest_BRD, joined_BR, num_anchors) / sizes_BA[:, :, None]).to(tokens_BND.dtype)
        assignment_BN = torch.zeros(tokens_BND.shape[:2], dtype=torch.int64, device=tokens_BND.device)
        assignment_BN.scatter_(1, chosen_BM, torch.arange(num_chosen, device=chosen_BM.device).expand_as(chosen_BM))
        assignment_BN.scatter_(1, rest_BR, joined_BR + num_chosen)
        return sorted_by_position(
            Reduction(
                torch.cat([gather_tokens(tokens_BND, chosen_BM), means_BAD], dim=1),
                torch.cat([chosen_BM, rest_BR.gather(1, anchors_BA)], dim=1),
                torch.cat([torch.ones_like(chosen_BM), sizes_BA], dim=1),
                assignment_BN,
            )
        )


def num_selected(share: float, budget: int) -> int:
    """Returns the number of tokens that the base selects; the rest of the budget is anchors, at least one."""
    # With an anchor, every token is represented at any budget.
    return min(int(share * budget), budget - 1)
