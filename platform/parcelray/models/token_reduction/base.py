"""What every training-free reducer is: visual tokens in, fewer visual tokens out, and where each one went."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from parcelray.errors import UnsupportedBudgetError, UserError

DROPPED = -1
"""Assignment of a token that is in no output token."""


class Reduction(NamedTuple):
    """Fewer tokens, and what became of the others."""

    tokens_BKD: Tensor
    """The tokens for the decoder, in the order of their position unless the reducer says otherwise."""
    position_ids_BK: Tensor
    """Place in the patch grid, row by row, of each output token, int64; of a merged one, of its member nearest to their mean place."""
    sizes_BK: Tensor
    """Input tokens in each output token, int64."""
    assignment_BN: Tensor
    """Output token of each input token, int64; `DROPPED`: none."""


class TokenReducer(ABC):
    """Reduces the visual tokens of each image, after the projector and before the decoder, without any training.

    It has no parameters, runs over a batch without a loop over its images, and gives an image the same tokens in any batch.
    """

    name: str

    def __call__(self, tokens_BND: Tensor, *, num_visual_tokens: int) -> Reduction:
        """Reduces.

        Args:
            tokens_BND: projected visual tokens, N of them in a square grid, row by row.
            num_visual_tokens: the budget K, 1 to N. At N every reducer returns the tokens as they are.

        Raises:
            UnsupportedBudgetError: the reducer cannot give K of N tokens.
            UserError: a token is not finite.
        """
        num_tokens = tokens_BND.shape[1]
        legal = self.supported_budgets(num_tokens)
        if num_visual_tokens not in legal:
            raise UnsupportedBudgetError(num_visual_tokens, legal, self.name)
        if not bool(tokens_BND.isfinite().all()):
            raise UserError(f"{self.name} got tokens that are not finite (NaN or infinite); check the model's precision.")
        if num_visual_tokens == num_tokens:
            return unreduced(tokens_BND)
        return self.reduce(tokens_BND, num_visual_tokens)

    def supported_budgets(self, num_tokens: int) -> tuple[int, ...]:
        """Legal budgets of N tokens, ascending."""
        return tuple(range(1, num_tokens + 1))

    @abstractmethod
    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int) -> Reduction:
        """Reduces N tokens to fewer; the arguments are legal."""


def unreduced(tokens_BND: Tensor) -> Reduction:
    """Every token as it is."""
    batch, num_tokens, _ = tokens_BND.shape
    places_BN = torch.arange(num_tokens, device=tokens_BND.device).expand(batch, -1)
    return Reduction(tokens_BND, places_BN, torch.ones_like(places_BN), places_BN)


def selection(tokens_BND: Tensor, kept_BK: Tensor) -> Reduction:
    """Some of the tokens, the others dropped.

    Args:
        tokens_BND: all.
        kept_BK: different places, in the order of the output.
    """
    batch, num_tokens, width = tokens_BND.shape
    assignment_BN = torch.full((batch, num_tokens), DROPPED, dtype=torch.int64, device=tokens_BND.device)
    numbers_BK = torch.arange(kept_BK.shape[1], device=tokens_BND.device).expand(batch, -1)
    assignment_BN.scatter_(1, kept_BK, numbers_BK)
    tokens_BKD = tokens_BND.gather(1, kept_BK[:, :, None].expand(-1, -1, width))
    return Reduction(tokens_BKD, kept_BK, torch.ones_like(kept_BK), assignment_BN)


def grid_side(num_tokens: int) -> int:
    """Side of the square grid.

    Raises:
        UserError: the tokens fill no square.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise UserError(f"{num_tokens} visual tokens fill no square grid; this reducer needs a square number of them.")
    return side
