"""Spatial sampling: tokens spread evenly over the grid."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from parcelray.models.token_reduction.base import Reduction, TokenReducer, grid_side, selection
from parcelray.models.token_reduction.context import ReductionContext


@dataclass(frozen=True)
class SpatialSampling(TokenReducer):
    """Tokens at even distances, nothing else looked at.

    The K places are rows of about the square root of K tokens each; rows and the places in them are centred, so that no
    border is preferred.
    """

    name = "spatial_sampling"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        kept = even_places(grid_side(tokens_BND.shape[1]), num_visual_tokens)
        return selection(tokens_BND, torch.tensor(kept, device=tokens_BND.device).expand(tokens_BND.shape[0], -1))


def even_places(side: int, count: int) -> list[int]:
    """`count` different places of a square grid in as even rows as possible, ascending."""
    num_rows = min(side, max(1, math.isqrt(count), -(-count // side)))
    rows = [(2 * row + 1) * side // (2 * num_rows) for row in range(num_rows)]
    places = []
    for number, row in enumerate(rows):
        # The remainder of an uneven division goes to rows that are spread over the grid, too.
        length = (number + 1) * count // num_rows - number * count // num_rows
        places += [row * side + (2 * column + 1) * side // (2 * length) for column in range(length)]
    return places
