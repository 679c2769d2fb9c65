"""Interface and shared operations of the training-free reducers of visual tokens.

Shape suffixes: B images (or prompts), N visual tokens before the reduction, K after it (the budget), D width of a
token, T text tokens, V visual tokens in the decoder, H attention heads, L width of the language model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from parcelray.config.reducer import Positions
from parcelray.errors import NotFiniteError, UnsupportedBudgetError, UserError
from parcelray.models.backbones.base import Depths
from parcelray.models.connectors import Connector
from parcelray.models.token_reduction.encoder_view import EncoderView

DROPPED = -1
"""Assignment of an input token that is in no output token."""

Reads = Literal["tokens", "encoder", "prompt"]
"""Inputs of a reducer: only the tokens, also the run of the vision tower, or also the prompt and the decoder."""


@dataclass(frozen=True)
class PromptView:
    """The prompt, and the attention of the decoder to the visual tokens."""

    embeddings_BTL: Tensor
    """Embeddings of the text after the images, left-padded."""
    valid_BT: Tensor
    """False for padding."""
    visual_BVL: Tensor
    """All visual tokens as they enter the decoder."""
    attention: Callable[[int], Tensor]
    """Maps a layer to the attention [B, H, T, V] of the text to the visual tokens; rows of padding are undefined."""
    num_layers: int
    """Number of layers of the decoder."""
    grid_side: int
    """Side of the patch grid of an image."""


@dataclass(frozen=True)
class ReductionContext:
    """Inputs of a reducer in addition to the visual tokens; see `TokenReducer.reads`."""

    encoder: EncoderView | None = None
    """Run of the vision tower that the tokens come from."""
    prompt: PromptView | None = None
    """Prompt and decoder, for reducers that depend on the prompt."""


NO_CONTEXT = ReductionContext()


class Reduction(NamedTuple):
    """The output tokens of a reducer, and the output token of each input token."""

    tokens_BKD: Tensor
    """Tokens for the decoder, ordered by position unless the reducer documents another order."""
    position_ids_BK: Tensor
    """Position of each output token among the input tokens (row-major patch grid), int64.

    A merged token has the position of one of its members.
    """
    sizes_BK: Tensor
    """Number of input tokens in each output token, int64."""
    assignment_BN: Tensor
    """Output token of each input token, int64; `DROPPED` if there is none."""


@dataclass(frozen=True)
class TokenReducer(ABC):
    """Reduces the visual tokens of each image, after the projector and before the decoder, without training.

    A reducer has no parameters, processes a batch without a loop over its images, and returns the same tokens for an
    image in any batch.

    Args:
        positions: which rotary positions the decoder gives to the remaining tokens.
    """

    positions: Positions = "contiguous"

    name: ClassVar[str]

    def __call__(
        self, tokens_BND: Tensor, *, num_visual_tokens: int, context: ReductionContext = NO_CONTEXT
    ) -> Reduction:
        """Reduces N tokens per image to the budget.

        Args:
            tokens_BND: projected visual tokens of a square grid, row-major.
            num_visual_tokens: budget K, 1 to N. With K = N every reducer returns the tokens unchanged.
            context: what the reducer needs besides the tokens, according to `reads`.

        Raises:
            UnsupportedBudgetError: the reducer cannot reduce N tokens to K.
            NotFiniteError: a token is not finite.
        """
        num_tokens = tokens_BND.shape[1]
        legal = self.supported_budgets(num_tokens)
        if num_visual_tokens not in legal:
            raise UnsupportedBudgetError(num_visual_tokens, legal, self.name)
        # The maximum norm of values that include a NaN is NaN.
        if not math.isfinite(float(torch.linalg.vector_norm(tokens_BND.detach(), math.inf))):
            raise NotFiniteError(
                f"{self.name} got tokens that are not finite (NaN or infinite); check the model's precision."
            )
        if num_visual_tokens == num_tokens:
            return unreduced(tokens_BND)
        return self.reduce(tokens_BND, num_visual_tokens, context)

    @property
    def reads(self) -> Reads:
        """The parts that the context must contain."""
        return "tokens"

    def supported_budgets(self, num_tokens: int) -> tuple[int, ...]:
        """Returns the legal budgets for N tokens in ascending order, for a model with enough layers."""
        return tuple(range(1, num_tokens + 1))

    def budgets_of(self, num_tokens: int, depths: Depths) -> tuple[int, ...]:
        """Returns the legal budgets for N tokens in ascending order, for a model with the given number of layers."""
        return self.supported_budgets(num_tokens)

    @abstractmethod
    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """Reduces N tokens to fewer; called with checked arguments."""


def check_uncompressed(connector: Connector) -> None:
    """Raises `UserError` if the model already compresses, that is, if its connector is not the identity."""
    if connector.name != "identity":
        raise UserError(
            "A training-free reducer needs the patch tokens of a model without compression, and this one has the"
            f" connector {connector.name}; evaluate it without a reducer, or give its vanilla base."
        )


def unreduced(tokens_BND: Tensor) -> Reduction:
    """Returns every token unchanged."""
    batch, num_tokens, _ = tokens_BND.shape
    positions_BN = torch.arange(num_tokens, device=tokens_BND.device).expand(batch, -1)
    return Reduction(tokens_BND, positions_BN, torch.ones_like(positions_BN), positions_BN)


def selection(tokens_BND: Tensor, kept_BK: Tensor) -> Reduction:
    """Keeps the tokens at the given positions and drops the others.

    Args:
        tokens_BND: all tokens.
        kept_BK: distinct positions, in the order of the output.
    """
    batch, num_tokens = tokens_BND.shape[:2]
    assignment_BN = torch.full((batch, num_tokens), DROPPED, dtype=torch.int64, device=tokens_BND.device)
    numbers_BK = torch.arange(kept_BK.shape[1], device=tokens_BND.device).expand(batch, -1)
    assignment_BN.scatter_(1, kept_BK, numbers_BK)
    return Reduction(gather_tokens(tokens_BND, kept_BK), kept_BK, torch.ones_like(kept_BK), assignment_BN)


def top_positions(scores_BN: Tensor, count: int) -> Tensor:
    """Returns the positions of the highest scores in ascending order, [B, count]; ties go to the lower position."""
    return scores_BN.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


def top_positions_by_window(scores_BN: Tensor, count: int, side: int, window: int) -> Tensor:
    """Selects the same number of positions from every window of the grid, up to one.

    In each round every window gives its highest remaining score. If the last round has more windows than positions are
    left, the windows with the higher scores give one.

    Args:
        scores_BN: scores of the patches of one image, or of several images one after another.
        count: number of positions to select.
        side: side of an image's patch grid.
        window: side of a window; windows at the right and lower border are smaller if it does not divide `side`.

    Returns:
        Positions in ascending order, int64 [B, count].
    """
    positions_N = torch.arange(scores_BN.shape[1], device=scores_BN.device)
    windows_per_side = -(-side // window)
    rows_N, columns_N = positions_N % side**2 // side // window, positions_N % side // window
    windows_N = (positions_N // side**2 * windows_per_side + rows_N) * windows_per_side + columns_N
    falling_BN = scores_BN.sort(dim=1, descending=True, stable=True).indices
    by_window_BN = falling_BN.gather(1, windows_N[falling_BN].argsort(dim=1, stable=True))
    sizes_W = torch.bincount(windows_N)
    rounds_N = positions_N - (sizes_W.cumsum(dim=0) - sizes_W).repeat_interleave(sizes_W)
    rounds_BN = torch.empty_like(falling_BN).scatter_(1, by_window_BN, rounds_N.expand_as(falling_BN))
    by_round_BN = falling_BN.gather(1, rounds_BN.gather(1, falling_BN).argsort(dim=1, stable=True))
    return by_round_BN[:, :count].sort(dim=1).values


def gather_tokens(tokens_BND: Tensor, positions_BK: Tensor) -> Tensor:
    """Returns the tokens at the given positions, [B, K, D]."""
    return tokens_BND.gather(1, positions_BK[:, :, None].expand(-1, -1, tokens_BND.shape[2]))


def other_positions(kept_BK: Tensor, num_tokens: int) -> Tensor:
    """Returns the positions of N tokens that are not in `kept_BK`, in ascending order, [B, N - K]."""
    kept_BN = torch.zeros(kept_BK.shape[0], num_tokens, dtype=torch.int8, device=kept_BK.device).scatter_(1, kept_BK, 1)
    return kept_BN.argsort(dim=1, stable=True)[:, : num_tokens - kept_BK.shape[1]]


def encoder_of(context: ReductionContext, name: str) -> EncoderView:
    """Returns the run of the vision tower from the context of the reducer `name`.

    Raises:
        ValueError: the context has none.
    """
    if context.encoder is None:
        raise ValueError(f"{name} reads the vision tower; pass a context with an encoder")
    return context.encoder


def prompt_of(context: ReductionContext, name: str) -> PromptView:
    """Returns prompt and decoder from the context of the reducer `name`.

    Raises:
        ValueError: the context has none.
    """
    if context.prompt is None:
        raise ValueError(f"{name} reads the prompt; pass a context with a prompt")
    return context.prompt


def grid_side(num_tokens: int) -> int:
    """Returns the side of the square grid of `num_tokens` tokens.

    Raises:
        UserError: the number of tokens is not a square.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise UserError(f"{num_tokens} visual tokens do not form a square grid; this reducer needs a square number.")
    return side
