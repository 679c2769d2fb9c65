"""LLaVA-PruMerge and PruMerge+ (ICCV 2025, arXiv 2403.15388): the most attended patches, merged with their neighbours.

In the published method, the outliers of the attention determine the number of tokens, which differs from image to
image. Here, with a fixed budget K, the K - 1 most attended patches are kept, and one more token collects the pruned
patches. In PruMerge+, a part of the K - 1 patches are every s-th patch of the whole grid.
"""

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
    gather_tokens,
    other_positions,
)

_NEIGHBOURS = 32
_SPACED_PER_ATTENDED = 3
"""Number of spaced patches for each attended one in PruMerge+, before rounding."""


@dataclass(frozen=True)
class PruMerge(TokenReducer):
    """Keeps the most attended patches and adds to each the attention-weighted features of its 32 nearest patches.

    Nearest are the patches with the largest cosine of their keys. The merging is before the projector. The output is in
    the order of the attention.

    Args:
        spatial: adds evenly spaced patches, so that regions without attention are represented (PruMerge+). As in the
            released code, they are the patches 0, s, 2 s, ... of the whole grid except the last patch, without those
            that are selected by attention, with s = int(int(N / a) / 3) for a attended patches. For a fixed budget,
            a is the largest number for which attended and spaced patches fit. Spaced patches that are also among the
            attended ones leave room for further attended patches.
    """

    spatial: bool = False
    name = "prumerge"

    @property
    def reads(self) -> Reads:
        """Attention and keys of the vision tower's last layer."""
        return "encoder"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        view = encoder_of(context, self.name)
        features_BND, attention_BN = view.patch_features_IND.float(), view.joint_attention_IN
        batch, num_tokens, _ = features_BND.shape
        count = num_visual_tokens - 1
        falling_BN = attention_BN.sort(dim=1, descending=True, stable=True).indices
        kept_BK = _with_spaced(falling_BN, count) if self.spatial else falling_BN[:, :count]
        weighted_BND = features_BND * attention_BN[:, :, None]
        keys_BND = F.normalize(view.joint_keys_IND, dim=2)
        similarity_BKN = gather_tokens(keys_BND, kept_BK) @ keys_BND.transpose(1, 2)
        # A patch is not its own neighbour.
        similarity_BKN.scatter_(2, kept_BK[:, :, None], -torch.inf)
        near_BKM = similarity_BKN.topk(min(_NEIGHBOURS, num_tokens - 1), dim=2).indices
        # A matrix product with ones at the neighbours: gathering 32 tokens per kept one would take too much memory.
        near_BKN = torch.zeros_like(similarity_BKN).scatter_(2, near_BKM, 1)
        merged_BKD = gather_tokens(features_BND, kept_BK) + near_BKN @ weighted_BND
        pruned_BR = other_positions(kept_BK, num_tokens)
        extra_B1D = gather_tokens(weighted_BND, pruned_BR).sum(dim=1, keepdim=True)
        assignment_BN = torch.full((batch, num_tokens), count, dtype=torch.int64, device=kept_BK.device)
        assignment_BN.scatter_(1, kept_BK, torch.arange(count, device=kept_BK.device).expand_as(kept_BK))
        strongest_B1 = pruned_BR.gather(1, attention_BN.gather(1, pruned_BR).argmax(dim=1, keepdim=True))
        sizes_BK = torch.ones_like(torch.cat([kept_BK, strongest_B1], dim=1))
        sizes_BK[:, -1] = pruned_BR.shape[1]
        tokens = view.project(torch.cat([merged_BKD, extra_B1D], dim=1).to(view.patch_features_IND.dtype))
        return Reduction(tokens, torch.cat([kept_BK, strongest_B1], dim=1), sizes_BK, assignment_BN)


def _with_spaced(falling_BN: Tensor, count: int) -> Tensor:
    """Returns the `count` positions that PruMerge+ keeps: the attended patches, then the spaced ones, int64 [B, count].

    Args:
        falling_BN: all positions by falling attention.
        count: number of positions to keep.
    """
    num_tokens = falling_BN.shape[1]
    spaced_N = torch.zeros(num_tokens, dtype=torch.bool, device=falling_BN.device)
    if (stride := spacing(num_tokens, count)) is not None:
        spaced_N[: num_tokens - 1 : stride] = True
    num_spaced = int(spaced_N.sum())
    # The attended patches end as soon as they and the spaced patches together are `count`.
    is_spaced_BN = spaced_N[falling_BN]
    is_other_BN = (~is_spaced_BN).long()
    is_attended_BN = is_other_BN.cumsum(dim=1) - is_other_BN < count - num_spaced
    by_attention_BN = torch.arange(num_tokens, device=falling_BN.device).expand_as(falling_BN)
    order_BN = torch.where(is_attended_BN, by_attention_BN, num_tokens + falling_BN)
    order_BN = order_BN.masked_fill(~is_attended_BN & ~is_spaced_BN, 2 * num_tokens)
    return falling_BN.gather(1, order_BN.argsort(dim=1, stable=True)[:, :count])


def spacing(num_tokens: int, count: int) -> int | None:
    """Returns the stride s of the spaced patches in PruMerge+ for `count` kept patches of N; None: no spaced patches.

    It is the stride of the largest number of attended patches that fits together with its spaced patches.
    """
    for attended in range(count, 0, -1):
        stride = num_tokens // attended // _SPACED_PER_ATTENDED
        if stride > 0 and attended + -(-(num_tokens - 1) // stride) <= count:
            return stride
    return None
