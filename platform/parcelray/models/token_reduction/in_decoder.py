"""Reducers that drop visual tokens between decoder layers, so that the mean over the layers is the budget."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.backbones.base import Depths
from parcelray.models.token_reduction.base import Reads, TokenReducer


class Stage(NamedTuple):
    """A reduction between two layers of the decoder."""

    layer: int
    """First layer with fewer tokens, counted from 0; at least 1."""
    num_tokens: int
    """Number of visual tokens that remain."""
    scored_at: int
    """Layer whose attention ranks the tokens: the one before `layer`, or `layer` itself, applied to its input."""


@dataclass(frozen=True)
class InDecoderReducer(TokenReducer):
    """A reducer that is called at each of its stages with the hidden states of the visual tokens.

    The budget of such a method is the mean number of visual tokens over the decoder's layers, the usual basis for
    comparing these methods.
    """

    @property
    def reads(self) -> Reads:
        """The prompt and the attention of the decoder."""
        return "prompt"

    def budgets_of(self, num_tokens: int, depths: Depths) -> tuple[int, ...]:
        """See `TokenReducer`: the smallest budget covers the layers before the first stage."""
        try:
            self.stages(depths.decoder, num_tokens, 1)
        except UnsupportedBudgetError as error:
            return tuple(error.supported)
        return tuple(range(1, num_tokens + 1))

    @abstractmethod
    def stages(self, num_layers: int, num_tokens: int, budget: int) -> tuple[Stage, ...]:
        """Returns the layers and token counts of a reduction from N tokens.

        Raises:
            UnsupportedBudgetError: no such reduction has the budget as its mean over the layers.
            UserError: the reducer starts at a layer that the decoder does not have.
        """

    def check_first_layer(self, setting: str, layer: int, num_layers: int) -> None:
        """Raises `UserError` if a decoder of `num_layers` has no layer with the index that a setting gives."""
        if layer >= num_layers:
            raise UserError(
                f"{self.name}.{setting} {layer} is not a layer of this decoder of {num_layers} layers; choose 1 to"
                f" {num_layers - 1}."
            )

    def budget_error(self, budget: int, smallest: int, num_tokens: int) -> UnsupportedBudgetError:
        """Returns the error for a budget that the layers before the first stage already exceed."""
        return UnsupportedBudgetError(
            budget, tuple(range(smallest, num_tokens + 1)), f"{self.name} (mean over the decoder's layers)"
        )


def tokens_by_layer(stages: tuple[Stage, ...], num_layers: int, num_tokens: int) -> list[int]:
    """Returns the number of visual tokens in each layer of the decoder, the first of which gets N."""
    counts = [num_tokens] * num_layers
    for stage in stages:
        counts[stage.layer :] = [stage.num_tokens] * (num_layers - stage.layer)
    return counts


def mean_tokens(stages: tuple[Stage, ...], num_layers: int, num_tokens: int) -> float:
    """Returns the mean number of visual tokens per layer of the decoder."""
    return sum(tokens_by_layer(stages, num_layers, num_tokens)) / num_layers
