"""Baselines that ignore the content of the tokens: random and spatial sampling.

Every measure of token importance has to beat random sampling.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from parcelray.models.token_reduction.base import Reduction, ReductionContext, TokenReducer, grid_side, selection


@dataclass(frozen=True)
class RandomSampling(TokenReducer):
    """Keeps tokens at random positions, the same for every image, in the order of the grid.

    Args:
        seed: seed of the positions; results should be averaged over several seeds.
    """

    seed: int = 0
    name = "random_sampling"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        generator = torch.Generator().manual_seed(self.seed)
        kept_K = torch.randperm(tokens_BND.shape[1], generator=generator)[:num_visual_tokens].sort().values
        return selection(tokens_BND, kept_K.to(tokens_BND.device).expand(tokens_BND.shape[0], -1))


@dataclass(frozen=True)
class SpatialSampling(TokenReducer):
    """Keeps tokens at evenly spaced positions of the grid.

    The K positions form about sqrt(K) rows of about sqrt(K) tokens. The rows, and the positions within a row, are
    centred, so that no border is preferred.
    """

    name = "spatial_sampling"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        kept = even_positions(grid_side(tokens_BND.shape[1]), num_visual_tokens)
        return selection(tokens_BND, torch.tensor(kept, device=tokens_BND.device).expand(tokens_BND.shape[0], -1))


def even_positions(side: int, count: int) -> list[int]:
    """Returns `count` distinct positions of a square grid in rows as even as possible, in ascending order."""
    num_rows = min(side, max(1, math.isqrt(count), -(-count // side)))
    rows = [(2 * row + 1) * side // (2 * num_rows) for row in range(num_rows)]
    positions = []
    for number, row in enumerate(rows):
        # The remainder of the division is spread over the rows as well.
        length = (number + 1) * count // num_rows - number * count // num_rows
        positions += [row * side + (2 * column + 1) * side // (2 * length) for column in range(length)]
    return positions
