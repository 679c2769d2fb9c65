"""LLaVA-PruMerge and PruMerge+ (ICCV 2025, arXiv 2403.15388): the most attended patches, merged with their neighbours.

In the published method, the outliers of the attention determine the number of tokens. Here, with a fixed budget K, the
K - 1 most attended patches are kept, and one more token collects the pruned patches.
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
_SPATIAL_SHARE = 3 / 4
"""Share of evenly spaced patches in PruMerge+: three for each patch selected by attention."""


@dataclass(frozen=True)
class PruMerge(TokenReducer):
    """Keeps the most attended patches and adds to each the attention-weighted features of its 32 nearest patches.

    Nearest are the patches with the largest cosine of their keys. The merging is before the projector. The output is in
    the order of the attention.

    Args:
        spatial: adds evenly spaced patches, so that regions without attention are represented (PruMerge+).
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
        num_spaced = int(_SPATIAL_SHARE * count) if self.spatial else 0
        kept_BK = attention_BN.sort(dim=1, descending=True, stable=True).indices[:, : count - num_spaced]
        if num_spaced:
            rest_BR = other_positions(kept_BK, num_tokens)
            spaced = torch.arange(num_spaced, device=kept_BK.device) * rest_BR.shape[1] // num_spaced
            kept_BK = torch.cat([kept_BK, rest_BR[:, spaced]], dim=1)
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
