"""DivPrune (CVPR 2025): maximises the smallest distance between the kept tokens, greedily."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import Reduction, ReductionContext, TokenReducer, selection


@dataclass(frozen=True)
class DivPrune(TokenReducer):
    """Keeps the tokens that differ most from one another, by greedy max-min selection on the projected embeddings.

    The first token is the one whose nearest neighbour is farthest. Each next token is the farthest from all tokens kept
    so far. The distance is 1 - cosine; ties go to the lower position; the output is in the order of the grid.
    """

    name = "divprune"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        return selection(tokens_BND, most_different(tokens_BND, num_visual_tokens))


def most_different(tokens_BND: Tensor, count: int) -> Tensor:
    """Returns the positions of the most different tokens in ascending order, int64 [B, count]; see `DivPrune`."""
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
        # Kept tokens stay excluded even if all remaining tokens are equal to them.
        nearest_BN[images_B, chosen_B] = -torch.inf
        chosen_B = nearest_BN.argmax(dim=1)
    return kept_BK.sort(dim=1).values
