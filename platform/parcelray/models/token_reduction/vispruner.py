"""VisPruner (ICCV 2025, arXiv 2412.01818): the most attended patches, and of the rest those that are least alike."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import (
    Reads,
    Reduction,
    TokenReducer,
    best,
    encoder_of,
    others,
    selection,
    taken,
)
from parcelray.models.token_reduction.context import ReductionContext

_REMOVED_A_STEP = 8


@dataclass(frozen=True)
class VisPruner(TokenReducer):
    """Important patches by the class token's attention; from the rest the most duplicated ones are removed, eight a step.

    Duplicates are found as in ToMe: the rest is split into every other patch, and a patch of the one half is as
    duplicated as its largest cosine with the other half.

    Args:
        important: share of the budget that attention chooses.
    """

    important: float = 0.5
    name = "vispruner"

    @property
    def reads(self) -> Reads:
        """The vision tower's attention and features."""
        return "encoder"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        view = encoder_of(context, self.name)
        num_important = int(self.important * num_visual_tokens)
        important_BI = best(view.attention_IHN.mean(dim=1), num_important)
        if num_important == num_visual_tokens:
            return selection(tokens_BND, important_BI)
        rest_BR = others(important_BI, tokens_BND.shape[1])
        directions_BND = F.normalize(view.patch_features_IND.float(), dim=2)
        wanted = num_visual_tokens - num_important
        while rest_BR.shape[1] > wanted:
            first_BA, second_BO = rest_BR[:, ::2], rest_BR[:, 1::2]
            alike_BA = (taken(directions_BND, first_BA) @ taken(directions_BND, second_BO).transpose(1, 2)).amax(dim=2)
            # At most a whole half a step: the half that is compared with stays.
            removed = min(_REMOVED_A_STEP, rest_BR.shape[1] - wanted, first_BA.shape[1])
            left_BA = alike_BA.argsort(dim=1, stable=True)[:, : first_BA.shape[1] - removed]
            rest_BR = torch.cat([first_BA.gather(1, left_BA), second_BO], dim=1).sort(dim=1).values
        return selection(tokens_BND, torch.cat([important_BI, rest_BR], dim=1).sort(dim=1).values)
