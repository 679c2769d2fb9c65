"""DivPrune (CVPR 2025): the tokens that differ most from each other, by greedy max-min distance on the projected embeddings."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import Reduction, TokenReducer, selection
from parcelray.models.token_reduction.context import ReductionContext


@dataclass(frozen=True)
class DivPrune(TokenReducer):
    """First the token whose nearest neighbour is farthest, then again and again the one farthest from all that were taken.

    Distance is 1 - cosine; of equal distances the first token wins; the output is in the order of the grid.
    """

    name = "divprune"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        return selection(tokens_BND, most_different(tokens_BND, num_visual_tokens))


def most_different(tokens_BND: Tensor, count: int) -> Tensor:
    """Places of the tokens that differ most from each other, ascending: int64 [B, count]."""
    directions_BND = F.normalize(tokens_BND.float(), dim=2)
    distances_BNN = 1 - directions_BND @ directions_BND.transpose(1, 2)
    batch, num_tokens = distances_BNN.shape[:2]
    own_NN = torch.eye(num_tokens, dtype=torch.bool, device=distances_BNN.device)
    chosen_B = distances_BNN.masked_fill(own_NN, torch.inf).amin(dim=2).argmax(dim=1)
    images_B = torch.arange(batch, device=distances_BNN.device)
    nearest_BN = torch.full((batch, num_tokens), torch.inf, device=distances_BNN.device)
    kept_BK = torch.empty(batch, count, dtype=torch.int64, device=distances_BNN.device)
    for step in range(count):
        kept_BK[:, step] = chosen_B
        nearest_BN = torch.minimum(nearest_BN, distances_BNN[images_B, chosen_B])
        # Taken tokens stay out even where all others are equal to them.
        nearest_BN[images_B, chosen_B] = -torch.inf
        chosen_B = nearest_BN.argmax(dim=1)
    return kept_BK.sort(dim=1).values
