"""Reducers that drop visual tokens between the layers of the decoder: when, and how many, so that the layers' mean is the budget."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from parcelray.errors import UnsupportedBudgetError
from parcelray.models.backbones.base import Depths
from parcelray.models.token_reduction.base import Reads, TokenReducer


class Stage(NamedTuple):
    """A reduction inside the decoder."""

    layer: int
    """Layers from this one on see fewer tokens, counted from 0; at least 1."""
    num_tokens: int
    """Visual tokens that are left."""
    scored_at: int
    """Layer whose attention ranks the tokens; `layer` itself: its projections, on what enters it."""


@dataclass(frozen=True)
class InDecoderReducer(TokenReducer):
    """A reducer that is called at each of its stages, with the hidden states of the visual tokens.

    The budget of such a method is the mean over the decoder's layers, as it is counted where they are compared with
    each other.
    """

    @property
    def reads(self) -> Reads:
        """The decoder's attention."""
        return "prompt"

    def budgets_of(self, num_tokens: int, depths: Depths) -> tuple[int, ...]:
        """See `TokenReducer`: at least what the layers before the first stage cost."""
        try:
            self.stages(depths.decoder, num_tokens, 1)
        except UnsupportedBudgetError as error:
            return tuple(error.supported)
        return tuple(range(1, num_tokens + 1))

    @abstractmethod
    def stages(self, num_layers: int, num_tokens: int, budget: int) -> tuple[Stage, ...]:
        """Where and how far to reduce N tokens.

        Raises:
            UnsupportedBudgetError: no such reduction has the budget as its mean over the layers.
        """

    def refused(self, budget: int, smallest: int, num_tokens: int) -> UnsupportedBudgetError:
        """The error for a budget below what the layers before the first stage already cost."""
        return UnsupportedBudgetError(
            budget, tuple(range(smallest, num_tokens + 1)), f"{self.name} (mean over the decoder's layers)"
        )


def mean_tokens(stages: tuple[Stage, ...], num_layers: int, num_tokens: int) -> float:
    """Visual tokens that a layer of the decoder sees on average."""
    total, count, start = 0, num_tokens, 0
    for stage in stages:
        total += (stage.layer - start) * count
        start, count = stage.layer, stage.num_tokens
    return (total + (num_layers - start) * count) / num_layers
