"""RESTORE (ICML 2026, arXiv 2606.01711): half of the budget chosen, half merged from what the choice leaves out.

The merged anchors stand for whole groups, so they go with their original positions and with attention logits that are
calibrated for group size and distance (`positions: original_calibrated`), which is this reducer's default.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.config.reducer import Positions
from parcelray.models.token_reduction.base import Reads, Reduction, TokenReducer, best, encoder_of, others, taken
from parcelray.models.token_reduction.context import ReductionContext
from parcelray.models.token_reduction.divprune import most_different
from parcelray.models.token_reduction.kmeans import cluster_sums
from parcelray.models.token_reduction.merging import in_order


@dataclass(frozen=True)
class Restore(TokenReducer):
    """Half by another reducer, half anchors of the rest.

    With cosines C of the rest, R_i = sum_j C_ij; anchors are the patches with the largest R_i (1 - max over j with R_j
    > R_i of C_ij), and every other patch of the rest is averaged into the anchor with the largest cosine.

    Args:
        positions: see `TokenReducer`.
        base: chooses the first half: `divprune`, or `class_attention` (the saliency that pruners of the vision tower
            start from).
        share: of the budget that the base chooses.
    """

    positions: Positions = "original_calibrated"
    base: Literal["divprune", "class_attention"] = "divprune"
    share: float = 0.5
    name = "restore"

    @property
    def reads(self) -> Reads:
        """Depends on the base."""
        return "encoder" if self.base == "class_attention" else "tokens"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        num_tokens = tokens_BND.shape[1]
        # At least one anchor, so that nothing is lost whatever the budget.
        num_chosen = min(int(self.share * num_visual_tokens), num_visual_tokens - 1)
        if num_chosen == 0:
            chosen_BM = torch.zeros(tokens_BND.shape[0], 0, dtype=torch.int64, device=tokens_BND.device)
        elif self.base == "divprune":
            chosen_BM = most_different(tokens_BND, num_chosen)
        else:
            chosen_BM = best(encoder_of(context, self.name).attention_IHN.mean(dim=1), num_chosen)
        rest_BR = others(chosen_BM, num_tokens)
        rest_BRD = taken(tokens_BND, rest_BR).float()
        directions_BRD = F.normalize(rest_BRD, dim=2)
        cosine_BRR = directions_BRD @ directions_BRD.transpose(1, 2)
        density_BR = cosine_BRR.sum(dim=2)
        denser_BRR = density_BR[:, None, :] > density_BR[:, :, None]
        nearest_BR = cosine_BRR.masked_fill(~denser_BRR, -torch.inf).amax(dim=2)
        # The densest of all has no denser neighbour and is an anchor in any case.
        scores_BR = torch.where(denser_BRR.any(dim=2), density_BR * (1 - nearest_BR), torch.inf)
        num_anchors = num_visual_tokens - num_chosen
        anchors_BA = best(scores_BR, num_anchors)
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
        return in_order(
            Reduction(
                torch.cat([taken(tokens_BND, chosen_BM), means_BAD], dim=1),
                torch.cat([chosen_BM, rest_BR.gather(1, anchors_BA)], dim=1),
                torch.cat([torch.ones_like(chosen_BM), sizes_BA], dim=1),
                assignment_BN,
            )
        )
