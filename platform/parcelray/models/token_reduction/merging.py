"""Merging of dropped tokens into kept ones, used by several reducers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import Reduction, gather_tokens
from parcelray.models.token_reduction.kmeans import cluster_sums


def nearest_of(features_BND: Tensor, kept_BK: Tensor) -> Tensor:
    """Assigns each token to the kept token with the largest cosine, a kept token to itself: int64 [B, N]."""
    directions_BND = F.normalize(features_BND.float(), dim=2)
    similarity_BNK = directions_BND @ gather_tokens(directions_BND, kept_BK).transpose(1, 2)
    numbers_BK = torch.arange(kept_BK.shape[1], device=kept_BK.device).expand_as(kept_BK)
    return similarity_BNK.argmax(dim=2).scatter_(1, kept_BK, numbers_BK)


def merged_into(tokens_BND: Tensor, kept_BK: Tensor, assignment_BN: Tensor) -> Reduction:
    """Averages the tokens assigned to each kept token, which keeps its position and order."""
    count = kept_BK.shape[1]
    sizes_BK = torch.zeros_like(kept_BK).scatter_add_(1, assignment_BN, torch.ones_like(assignment_BN))
    sums_BKD = cluster_sums(tokens_BND, assignment_BN, count)
    return Reduction((sums_BKD / sizes_BK[:, :, None]).to(tokens_BND.dtype), kept_BK, sizes_BK, assignment_BN)


def sorted_by_position(reduction: Reduction) -> Reduction:
    """Returns the same tokens sorted by position."""
    return reordered(reduction, reduction.position_ids_BK.argsort(dim=1, stable=True))


def reordered(reduction: Reduction, order_BK: Tensor) -> Reduction:
    """Returns the same tokens in another order.

    Args:
        reduction: the reduction to reorder.
        order_BK: for each index of the output, the index in `reduction`.
    """
    rank_BK = order_BK.argsort(dim=1)
    assignment_BN = torch.where(
        reduction.assignment_BN < 0, reduction.assignment_BN, rank_BK.gather(1, reduction.assignment_BN.clamp(min=0))
    )
    return Reduction(
        gather_tokens(reduction.tokens_BKD, order_BK),
        reduction.position_ids_BK.gather(1, order_BK),
        reduction.sizes_BK.gather(1, order_BK),
        assignment_BN,
    )
