"""VisionZip (CVPR 2025, arXiv 2412.04467): the most attended patches, the class token, and the merged rest."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import (
    DROPPED,
    Reads,
    Reduction,
    ReductionContext,
    TokenReducer,
    encoder_of,
    gather_tokens,
    other_positions,
    top_positions,
)
from parcelray.models.token_reduction.kmeans import cluster_sums

_CONTEXTUAL_SHARE = 10 / 64
"""Share of merged (contextual) tokens in a budget: 10 of 64, 20 of 128, 30 of 192."""


@dataclass(frozen=True)
class VisionZip(TokenReducer):
    """Selects dominant tokens by attention and merges contextual tokens from the rest, before the projector.

    Of a budget K, 10/64 are contextual. Their targets are evenly spaced among the remaining patches. Each other
    remaining patch joins the target with the most similar key. A contextual token is the target plus the mean of the
    patches that joined it. The class token, if the tower has one, is the first dominant token.
    """

    name = "visionzip"

    @property
    def reads(self) -> Reads:
        """Attention and keys of the vision tower."""
        return "encoder"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        view = encoder_of(context, self.name)
        features_BND, class_BD = view.patch_features_IND, view.class_features_ID
        batch, num_tokens, _ = features_BND.shape
        num_targets = num_contextual(num_visual_tokens)
        num_patches = num_visual_tokens - num_targets - int(class_BD is not None)
        kept_BM = top_positions(view.attention_IHN.sum(dim=1), num_patches)
        rest_BR = other_positions(kept_BM, num_tokens)
        # Evenly spaced over the remaining patches, from the first one on.
        targets_C = torch.arange(num_targets, device=rest_BR.device) * max(1, rest_BR.shape[1] // max(1, num_targets))
        targets_BC = rest_BR[:, targets_C]
        metric_BND = F.normalize(view.keys_IHND.mean(dim=1), dim=2)
        joined_BN = _joined(metric_BND, targets_BC, kept_BM)
        dropped_BN1 = (joined_BN < 0)[:, :, None]
        sums_BCD = cluster_sums(
            features_BND.float().masked_fill(dropped_BN1, 0), joined_BN.clamp(min=0), max(1, num_targets)
        )[:, :num_targets]
        counts_BC1 = cluster_sums((~dropped_BN1).float(), joined_BN.clamp(min=0), max(1, num_targets))[:, :num_targets]
        targets_BCD = gather_tokens(features_BND, targets_BC).float()
        contextual_BCD = targets_BCD + sums_BCD / counts_BC1.clamp(min=1)
        parts = [gather_tokens(features_BND, kept_BM), contextual_BCD.to(features_BND.dtype)]
        positions, sizes = [kept_BM, targets_BC], [torch.ones_like(kept_BM), 1 + counts_BC1.squeeze(2).long()]
        first = 0
        if class_BD is not None:
            first = 1
            parts.insert(0, class_BD[:, None])
            positions.insert(0, kept_BM.new_zeros(batch, 1))
            sizes.insert(0, kept_BM.new_ones(batch, 1))
        assignment_BN = torch.where(joined_BN < 0, DROPPED, joined_BN + first + num_patches)
        assignment_BN.scatter_(1, kept_BM, first + torch.arange(num_patches, device=kept_BM.device).expand_as(kept_BM))
        numbers_BC = first + num_patches + torch.arange(num_targets, device=kept_BM.device).expand_as(targets_BC)
        assignment_BN.scatter_(1, targets_BC, numbers_BC)
        return Reduction(
            view.project(torch.cat(parts, dim=1)), torch.cat(positions, dim=1), torch.cat(sizes, dim=1), assignment_BN
        )


def num_contextual(budget: int) -> int:
    """Returns the number of contextual tokens in a budget."""
    return round(_CONTEXTUAL_SHARE * budget)


def _joined(metric_BND: Tensor, targets_BC: Tensor, kept_BM: Tensor) -> Tensor:
    """Returns the target that each patch joins, int64 [B, N]; -1 for dominant patches and targets.

    Without any target, all are -1.
    """
    none_BN = torch.full(metric_BND.shape[:2], DROPPED, dtype=torch.int64, device=metric_BND.device)
    if targets_BC.shape[1] == 0:
        return none_BN
    joined_BN = (metric_BND @ gather_tokens(metric_BND, targets_BC).transpose(1, 2)).argmax(dim=2)
    return joined_BN.scatter(1, kept_BM, DROPPED).scatter(1, targets_BC, DROPPED)
