"""VisPruner (ICCV 2025, arXiv 2412.01818): the most attended patches, and the least similar ones of the rest."""

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
    selection,
)

_REMOVED_A_STEP = 8


@dataclass(frozen=True)
class VisPruner(TokenReducer):
    """Keeps the patches with the most class attention, and prunes the rest by removing duplicates, eight per step.

    Duplicates are found as in ToMe: every other patch of the rest is in the first half, the others are in the second
    half. The patches of the first half with the largest cosine to any patch of the second half are removed. As in the
    released code, the rest is at first in the order of falling attention, and after each step the first half, in the
    order of falling cosine, precedes the second.

    Args:
        important: share of the budget that is selected by attention.
    """

    important: float = 0.5
    name = "vispruner"

    @property
    def reads(self) -> Reads:
        """Attention and features of the vision tower."""
        return "encoder"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        view = encoder_of(context, self.name)
        num_important = int(self.important * num_visual_tokens)
        falling_BN = view.attention_IHN.mean(dim=1).sort(dim=1, descending=True, stable=True).indices
        wanted = num_visual_tokens - num_important
        rest_BR = falling_BN[:, num_important:] if wanted else falling_BN[:, :0]
        directions_BND = F.normalize(view.patch_features_IND.float(), dim=2)
        while rest_BR.shape[1] > wanted:
            first_BA, second_BO = rest_BR[:, ::2], rest_BR[:, 1::2]
            alike_BA = (
                gather_tokens(directions_BND, first_BA) @ gather_tokens(directions_BND, second_BO).transpose(1, 2)
            ).amax(dim=2)
            removed = _removed(rest_BR.shape[1], wanted)
            left_BA = alike_BA.argsort(dim=1, descending=True, stable=True)[:, removed:]
            rest_BR = torch.cat([first_BA.gather(1, left_BA), second_BO], dim=1)
        kept_BK = torch.cat([falling_BN[:, :num_important], rest_BR], dim=1)
        return selection(tokens_BND, kept_BK.sort(dim=1).values)


def halves_of(num_tokens: int, budget: int, important: float) -> list[tuple[int, int]]:
    """Returns the sizes of the two halves of the rest that each step compares."""
    wanted = budget - int(important * budget)
    rest = num_tokens - budget + wanted if wanted else 0
    halves = []
    while rest > wanted:
        halves.append((-(-rest // 2), rest // 2))
        rest -= _removed(rest, wanted)
    return halves


def _removed(rest: int, wanted: int) -> int:
    """Returns the number of patches that a step removes from the rest: at most its first half."""
    return min(_REMOVED_A_STEP, rest - wanted, -(-rest // 2))
