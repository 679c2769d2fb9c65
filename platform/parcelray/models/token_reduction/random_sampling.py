"""Random sampling: the baseline that any measure of importance has to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from parcelray.models.token_reduction.base import Reduction, TokenReducer, selection
from parcelray.models.token_reduction.context import ReductionContext


@dataclass(frozen=True)
class RandomSampling(TokenReducer):
    """Tokens at random places, the same places for every image, in the order of the grid.

    Args:
        seed: of the places; results need several.
    """

    seed: int = 0
    name = "random_sampling"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        generator = torch.Generator().manual_seed(self.seed)
        kept_K = torch.randperm(tokens_BND.shape[1], generator=generator)[:num_visual_tokens].sort().values
        return selection(tokens_BND, kept_K.to(tokens_BND.device).expand(tokens_BND.shape[0], -1))
