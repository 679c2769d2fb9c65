"""Average pooling over the cells of a coarser grid: the operation of M3, without its training."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from parcelray.models.token_reduction.base import Reduction, ReductionContext, TokenReducer, grid_side
from parcelray.models.token_reduction.kmeans import cluster_sums


@dataclass(frozen=True)
class AveragePooling(TokenReducer):
    """Averages rectangular cells of the grid; the budget must be a square number.

    The sides of the cells differ by at most one patch.
    """

    name = "average_pooling"

    def supported_budgets(self, num_tokens: int) -> tuple[int, ...]:
        """Returns the squares up to N."""
        return tuple(side * side for side in range(1, grid_side(num_tokens) + 1))

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        batch, num_tokens, _ = tokens_BND.shape
        side, cells = grid_side(num_tokens), grid_side(num_visual_tokens)
        cell_S = torch.arange(side, device=tokens_BND.device) * cells // side
        assignment_N = (cell_S[:, None] * cells + cell_S[None, :]).flatten()
        sizes_K = torch.bincount(assignment_N, minlength=num_visual_tokens)
        sums_BKD = cluster_sums(tokens_BND, assignment_N.expand(batch, -1), num_visual_tokens)
        # Cell c of a side begins at the first patch s with s * cells >= c * side.
        edges = [-(-cell * side // cells) for cell in range(cells + 1)]
        middles = [(first + after) // 2 for first, after in pairwise(edges)]
        centres_K = torch.tensor(
            [row * side + column for row in middles for column in middles], device=tokens_BND.device
        )
        tokens_BKD = (sums_BKD / sizes_K[:, None]).to(tokens_BND.dtype)
        return Reduction(
            tokens_BKD, centres_K.expand(batch, -1), sizes_K.expand(batch, -1), assignment_N.expand(batch, -1)
        )
