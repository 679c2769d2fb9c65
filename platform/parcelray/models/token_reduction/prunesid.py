"""PruneSID (ICLR 2026, arXiv 2603.09480): groups patches by principal components and selects within each group."""

import math
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
)

_TOKENS_A_GROUP, _SUPPRESSION, _MOST_OF_64 = 4, 32, 5


@dataclass(frozen=True)
class PruneSID(TokenReducer):
    """Selects the most attended patches of each group that are not too similar to one another, before the projector.

    For a budget K:

    1. Groups. The sigmoid of the features, each patch centred over its width, has K / 4 principal components over the
       patches. A patch is in the group of the component with its largest loading.
    2. Suppression. In each group, the patch with the most class attention (summed over heads) suppresses similar ones:
       those with a cosine above K / 32 times the mean cosine of all pairs. Then the next remaining patch does the same.
    3. Quotas. A group gives its share of the remaining patches of all groups. This is at least one patch, and at most 5
       for each 64 of the budget.

    The class token, if the tower has one, comes first.
    """

    name = "prunesid"

    @property
    def reads(self) -> Reads:
        """The vision tower's attention and features."""
        return "encoder"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        view = encoder_of(context, self.name)
        features_BND, class_BD = view.patch_features_IND, view.class_features_ID
        num_tokens, width = features_BND.shape[1:]
        first = int(class_BD is not None)
        # Centred features have at most `width - 1` components; further ones would be rounding errors.
        num_groups = max(1, min(num_visual_tokens // _TOKENS_A_GROUP, width - 1))
        group_BN = _groups(features_BND, num_groups)
        # Ranks by attention; ties go to the lower position.
        rank_BN = view.attention_IHN.sum(dim=1).sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
        directions_BND = F.normalize(features_BND.float(), dim=2)
        cosine_BNN = directions_BND @ directions_BND.transpose(1, 2)
        mean_B = (cosine_BNN.sum(dim=(1, 2)) - cosine_BNN.diagonal(dim1=1, dim2=2).sum(dim=1)) / (
            num_tokens * (num_tokens - 1)
        )
        left_BN = _unsuppressed(
            cosine_BNN > (num_visual_tokens / _SUPPRESSION * mean_B)[:, None, None], group_BN, rank_BN, num_groups
        )
        sizes_BG, left_BG = (_counts(group_BN, each, num_groups) for each in (torch.ones_like(left_BN), left_BN))
        quotas_BG = _quotas(sizes_BG, left_BG, num_visual_tokens, num_visual_tokens - first)
        # Sorted by group, and within each group the remaining patches before the suppressed ones.
        order_BN = ((group_BN * 2 + ~left_BN) * num_tokens + rank_BN).argsort(dim=1)
        ordered_BN = group_BN.gather(1, order_BN)
        number_BN = torch.arange(num_tokens, device=order_BN.device) - (sizes_BG.cumsum(dim=1) - sizes_BG).gather(
            1, ordered_BN
        )
        chosen_BN = number_BN < quotas_BG.gather(1, ordered_BN)
        kept_BK = order_BN.gather(
            1, (~chosen_BN).to(torch.int8).argsort(dim=1, stable=True)[:, : num_visual_tokens - first]
        )
        tokens, positions = gather_tokens(features_BND, kept_BK), kept_BK
        if class_BD is not None:
            tokens, positions = torch.cat([class_BD[:, None], tokens], dim=1), F.pad(kept_BK, (1, 0))
        assignment_BN = torch.full_like(group_BN, DROPPED)
        assignment_BN.scatter_(
            1, kept_BK, first + torch.arange(kept_BK.shape[1], device=kept_BK.device).expand_as(kept_BK)
        )
        return Reduction(view.project(tokens), positions, torch.ones_like(positions), assignment_BN)


def _groups(features_BND: Tensor, num_groups: int) -> Tensor:
    """Returns the component with the largest loading of each patch, int64 [B, N]; component 0 explains the most."""
    # The published randomised decomposition varies from run to run; this is its exact limit. In single precision, the
    # groups of an image could depend on the batch that it is in.
    squashed_BND = features_BND.double().sigmoid()
    centred_BND = squashed_BND - squashed_BND.mean(dim=2, keepdim=True)
    loadings_BNN = torch.linalg.eigh(centred_BND @ centred_BND.transpose(1, 2)).eigenvectors
    groups_BN: Tensor = loadings_BNN[:, :, -num_groups:].flip(2).abs().argmax(dim=2)
    return groups_BN


def _unsuppressed(alike_BNN: Tensor, group_BN: Tensor, rank_BN: Tensor, num_groups: int) -> Tensor:
    """Returns which patches no higher-ranked patch of their group suppresses, bool [B, N].

    All groups of all images are processed in parallel, one patch per group and step.
    """
    batch, num_tokens = group_BN.shape
    waiting_BN = torch.ones_like(group_BN, dtype=torch.bool)
    left_BN = torch.zeros_like(waiting_BN)
    while bool(waiting_BN.any()):
        best_BG = rank_BN.new_full((batch, num_groups), num_tokens).scatter_reduce_(
            1, group_BN, rank_BN.where(waiting_BN, num_tokens), "amin"
        )
        turn_BN = waiting_BN & (rank_BN == best_BG.gather(1, group_BN))
        left_BN |= turn_BN
        # A round processes at most one patch per group, so the sum is its position. A finished group has no waiting
        # patch that could be suppressed.
        position_BG = best_BG.new_zeros(batch, num_groups).scatter_add_(
            1, group_BN, torch.arange(num_tokens, device=group_BN.device) * turn_BN
        )
        suppressed_BN = alike_BNN.gather(2, position_BG.gather(1, group_BN)[:, :, None]).squeeze(2)
        waiting_BN &= ~(turn_BN | suppressed_BN)
    return left_BN


def _counts(group_BN: Tensor, counted_BN: Tensor, num_groups: int) -> Tensor:
    return group_BN.new_zeros(group_BN.shape[0], num_groups).scatter_add_(1, group_BN, counted_BN.long())


def _quotas(sizes_BG: Tensor, left_BG: Tensor, budget: int, num_patches: int) -> Tensor:
    """Returns the number of patches that each group gives, `num_patches` in total: int64 [B, G]."""
    most_BG = torch.minimum(left_BG, sizes_BG).clamp(max=_MOST_OF_64 * math.ceil(budget / 64))
    while bool((short_B1 := most_BG.sum(dim=1, keepdim=True) < budget).any()):
        most_BG = torch.where(short_B1, torch.minimum(most_BG + 1, sizes_BG), most_BG)
    least_BG = sizes_BG.clamp(max=min(1, num_patches))
    rest_B1 = num_patches - least_BG.sum(dim=1, keepdim=True)
    share_BG = left_BG / left_BG.sum(dim=1, keepdim=True)
    # Cumulative sums are rounded, so that the parts add up to the total.
    parts_BG = (share_BG.double().cumsum(dim=1) * rest_B1).round().long().diff(dim=1, prepend=torch.zeros_like(rest_B1))
    quotas_BG = torch.minimum(least_BG + parts_BG, most_BG)
    # Where groups have reached their limit, the largest other groups give more.
    order_BG = left_BG.argsort(dim=1, descending=True, stable=True)
    room_BG = (most_BG - quotas_BG).gather(1, order_BG)
    missing_B1 = num_patches - quotas_BG.sum(dim=1, keepdim=True)
    filled_BG = (missing_B1 - (room_BG.cumsum(dim=1) - room_BG)).clamp(min=0).minimum(room_BG)
    return quotas_BG.scatter_add(1, order_BG, filled_BG)
