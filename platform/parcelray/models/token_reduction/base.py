"""What every training-free reducer is: visual tokens in, fewer visual tokens out, and where each one went."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from parcelray.config.reducer import Positions
from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.backbones.base import Depths
from parcelray.models.connectors import Connector
from parcelray.models.token_reduction.context import NO_CONTEXT, ReductionContext
from parcelray.models.token_reduction.encoder_view import EncoderView

DROPPED = -1
"""Assignment of a token that is in no output token."""

Reads = Literal["tokens", "encoder", "prompt"]
"""The most that a reducer looks at: the tokens alone, the vision tower's run, or the prompt and the decoder."""


class Reduction(NamedTuple):
    """Fewer tokens, and what became of the others."""

    tokens_BKD: Tensor
    """The tokens for the decoder, in the order of their position unless the reducer says otherwise."""
    position_ids_BK: Tensor
    """Place among the input tokens (in the patch grid, row by row) of each output token, int64; of a merged one, of one of its members."""
    sizes_BK: Tensor
    """Input tokens in each output token, int64."""
    assignment_BN: Tensor
    """Output token of each input token, int64; `DROPPED`: none."""


@dataclass(frozen=True)
class TokenReducer(ABC):
    """Reduces the visual tokens of each image, after the projector and before the decoder, without any training.

    It has no parameters, runs over a batch without a loop over its images, and gives an image the same tokens in any
    batch.

    Args:
        positions: which rotary positions the decoder gives the tokens that are left.
    """

    positions: Positions = "contiguous"

    name: ClassVar[str]

    def __call__(
        self, tokens_BND: Tensor, *, num_visual_tokens: int, context: ReductionContext = NO_CONTEXT
    ) -> Reduction:
        """Reduces.

        Args:
            tokens_BND: projected visual tokens, N of them in a square grid, row by row.
            num_visual_tokens: the budget K, 1 to N. At N every reducer returns the tokens as they are.
            context: what the reducer `reads` besides the tokens.

        Raises:
            UnsupportedBudgetError: the reducer cannot give K of N tokens.
            UserError: a token is not finite.
        """
        num_tokens = tokens_BND.shape[1]
        legal = self.supported_budgets(num_tokens)
        if num_visual_tokens not in legal:
            raise UnsupportedBudgetError(num_visual_tokens, legal, self.name)
        # The largest of numbers with a NaN among them is a NaN.
        if not math.isfinite(float(torch.linalg.vector_norm(tokens_BND.detach(), math.inf))):
            raise UserError(
                f"{self.name} got tokens that are not finite (NaN or infinite); check the model's precision."
            )
        if num_visual_tokens == num_tokens:
            return unreduced(tokens_BND)
        return self.reduce(tokens_BND, num_visual_tokens, context)

    @property
    def reads(self) -> Reads:
        """What the context has to hold."""
        return "tokens"

    def supported_budgets(self, num_tokens: int) -> tuple[int, ...]:
        """Legal budgets of N tokens, ascending, of a model that is deep enough."""
        return tuple(range(1, num_tokens + 1))

    def budgets_of(self, num_tokens: int, depths: Depths) -> tuple[int, ...]:
        """Legal budgets of N tokens in a model, ascending."""
        return self.supported_budgets(num_tokens)

    @abstractmethod
    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """Reduces N tokens to fewer; the arguments are legal."""


def check_uncompressed(connector: Connector) -> None:
    """Refuses a model that compresses already.

    Raises:
        UserError: the connector is not the identity.
    """
    if connector.name != "identity":
        raise UserError(
            "A training-free reducer takes the patch tokens of a model without compression, and this one has the"
            f" connector {connector.name}; evaluate it without a reducer, or give its vanilla base."
        )


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
    batch, num_tokens = tokens_BND.shape[:2]
    assignment_BN = torch.full((batch, num_tokens), DROPPED, dtype=torch.int64, device=tokens_BND.device)
    numbers_BK = torch.arange(kept_BK.shape[1], device=tokens_BND.device).expand(batch, -1)
    assignment_BN.scatter_(1, kept_BK, numbers_BK)
    return Reduction(taken(tokens_BND, kept_BK), kept_BK, torch.ones_like(kept_BK), assignment_BN)


def best(scores_BN: Tensor, count: int) -> Tensor:
    """Places of the highest scores, ascending, [B, count]; of equal scores the first ones."""
    return scores_BN.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


def best_by_window(scores_BN: Tensor, count: int, side: int, window: int) -> Tensor:
    """Places that are the best ones of their windows: every window gives its highest score, then its second, until there are enough.

    Args:
        scores_BN: of the patches of one image or of several, one after the other.
        count: places to take; where the last round has more windows than places are left, those with the higher scores
            give one.
        side: of an image's patch grid.
        window: side of a window; those at the right and lower border are smaller where it does not divide the grid's
            side.

    Returns:
        Places, ascending, int64 [B, count].
    """
    places_N = torch.arange(scores_BN.shape[1], device=scores_BN.device)
    windows_a_side = -(-side // window)
    rows_N, columns_N = places_N % side**2 // side // window, places_N % side // window
    windows_N = (places_N // side**2 * windows_a_side + rows_N) * windows_a_side + columns_N
    falling_BN = scores_BN.sort(dim=1, descending=True, stable=True).indices
    by_window_BN = falling_BN.gather(1, windows_N[falling_BN].argsort(dim=1, stable=True))
    sizes_W = torch.bincount(windows_N)
    rounds_N = places_N - (sizes_W.cumsum(dim=0) - sizes_W).repeat_interleave(sizes_W)
    rounds_BN = torch.empty_like(falling_BN).scatter_(1, by_window_BN, rounds_N.expand_as(falling_BN))
    in_turn_BN = falling_BN.gather(1, rounds_BN.gather(1, falling_BN).argsort(dim=1, stable=True))
    return in_turn_BN[:, :count].sort(dim=1).values


def taken(tokens_BND: Tensor, places_BK: Tensor) -> Tensor:
    """The tokens at some places: [B, K, D]."""
    return tokens_BND.gather(1, places_BK[:, :, None].expand(-1, -1, tokens_BND.shape[2]))


def others(kept_BK: Tensor, num_tokens: int) -> Tensor:
    """The places that are not kept, ascending: [B, N - K]."""
    kept_BN = torch.zeros(kept_BK.shape[0], num_tokens, dtype=torch.int8, device=kept_BK.device).scatter_(1, kept_BK, 1)
    return kept_BN.argsort(dim=1, stable=True)[:, : num_tokens - kept_BK.shape[1]]


def encoder_of(context: ReductionContext, name: str) -> EncoderView:
    """The run of the vision tower.

    Raises:
        ValueError: the context has none.
    """
    if context.encoder is None:
        raise ValueError(f"{name} reads the vision tower; give it a context with an encoder")
    return context.encoder


def grid_side(num_tokens: int) -> int:
    """Side of the square grid.

    Raises:
        UserError: the tokens fill no square.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise UserError(f"{num_tokens} visual tokens fill no square grid; this reducer needs a square number of them.")
    return side
