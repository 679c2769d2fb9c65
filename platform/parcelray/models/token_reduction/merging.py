"""Merging of dropped tokens into kept ones, as several reducers do."""

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import Reduction, taken
from parcelray.models.token_reduction.kmeans import cluster_sums


def nearest_of(features_BND: Tensor, kept_BK: Tensor) -> Tensor:
    """For every token the kept one with the largest cosine, itself where it is kept: int64 [B, N]."""
    directions_BND = F.normalize(features_BND.float(), dim=2)
    similarity_BNK = directions_BND @ taken(directions_BND, kept_BK).transpose(1, 2)
    numbers_BK = torch.arange(kept_BK.shape[1], device=kept_BK.device).expand_as(kept_BK)
    return similarity_BNK.argmax(dim=2).scatter_(1, kept_BK, numbers_BK)


def merged_into(tokens_BND: Tensor, kept_BK: Tensor, assignment_BN: Tensor) -> Reduction:
    """Means of the tokens that are assigned to each kept one, itself included, in the kept ones' order and place."""
    count = kept_BK.shape[1]
    sizes_BK = torch.zeros_like(kept_BK).scatter_add_(1, assignment_BN, torch.ones_like(assignment_BN))
    sums_BKD = cluster_sums(tokens_BND, assignment_BN, count)
    return Reduction((sums_BKD / sizes_BK[:, :, None]).to(tokens_BND.dtype), kept_BK, sizes_BK, assignment_BN)


def in_order(reduction: Reduction) -> Reduction:
    """The same tokens in the order of their places."""
    return reordered(reduction, reduction.position_ids_BK.argsort(dim=1, stable=True))


def reordered(reduction: Reduction, order_BK: Tensor) -> Reduction:
    """The same tokens in another order.

    Args:
        reduction: before.
        order_BK: for each place of the output the place before.
    """
    rank_BK = order_BK.argsort(dim=1)
    assignment_BN = torch.where(
        reduction.assignment_BN < 0, reduction.assignment_BN, rank_BK.gather(1, reduction.assignment_BN.clamp(min=0))
    )
    return Reduction(
        taken(reduction.tokens_BKD, order_BK),
        reduction.position_ids_BK.gather(1, order_BK),
        reduction.sizes_BK.gather(1, order_BK),
        assignment_BN,
    )
