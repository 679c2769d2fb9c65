"""Cluster & Aggregate (arXiv 2504.17892): K-means++ on the projected visual tokens; each cluster's mean is a token.

The paper specifies the similarity of the embeddings and the mean. The iterations, the order and the positions of the
output tokens are not given in the text that is accessible, so they are choices made here: Lloyd's iterations run until
no token changes its cluster, and a cluster has the position of the member nearest to its mean row and column.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import Reduction, ReductionContext, TokenReducer, gather_tokens, grid_side
from parcelray.models.token_reduction.kmeans import Seeding, cluster_sums, kmeans
from parcelray.models.token_reduction.merging import reordered, sorted_by_position


@dataclass(frozen=True)
class ClusterAggregate(TokenReducer):
    """Replaces the tokens by the means of K clusters.

    Args:
        metric: `euclidean`: distance of the tokens; `cosine`: distance of the tokens scaled to length 1.
        order: order of the output: by `position`, or `random` (seeded).
        weighting: weight of each member in its cluster's mean: `mean`: equal; `norm`: the token's length.
        seeding: see `kmeans`.
        max_iterations: see `kmeans`.
        seed: seed of the K-means seeding and of the random order.
    """

    metric: Literal["euclidean", "cosine"] = "euclidean"
    order: Literal["position", "random"] = "position"
    weighting: Literal["mean", "norm"] = "mean"
    seeding: Seeding = "greedy"
    max_iterations: int = 20
    seed: int = 0
    name = "cluster_aggregate"

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        features_BND = F.normalize(tokens_BND.float(), dim=2) if self.metric == "cosine" else tokens_BND
        clusters = kmeans(
            features_BND, num_visual_tokens, seed=self.seed, seeding=self.seeding, max_iterations=self.max_iterations
        )
        weighted_BND, totals_BK1 = tokens_BND, clusters.sizes_BK[:, :, None]
        if self.weighting == "norm":
            weights_BN1 = tokens_BND.float().norm(dim=2, keepdim=True)
            totals_BK1 = cluster_sums(weights_BN1, clusters.assignment_BN, num_visual_tokens).clamp(
                min=torch.finfo(torch.float32).tiny
            )
            weighted_BND = tokens_BND.float() * weights_BN1
        means_BKD = cluster_sums(weighted_BND, clusters.assignment_BN, num_visual_tokens) / totals_BK1
        merged = Reduction(means_BKD.to(tokens_BND.dtype), *_positions(clusters.assignment_BN, clusters.sizes_BK))
        if self.order == "position":
            return sorted_by_position(merged)
        drawn_K = torch.randperm(num_visual_tokens, generator=torch.Generator().manual_seed(self.seed))
        return reordered(merged, drawn_K.to(tokens_BND.device).expand(tokens_BND.shape[0], -1))


def _positions(assignment_BN: Tensor, sizes_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns position, size and assignment of the clusters, as in `Reduction`.

    The position is that of the member nearest to the mean row and column; ties go to the lower position.
    """
    num_tokens = assignment_BN.shape[1]
    side = grid_side(num_tokens)
    positions_BN = torch.arange(num_tokens, device=assignment_BN.device).expand_as(assignment_BN)
    points_BN2 = torch.stack([positions_BN // side, positions_BN % side], dim=2)
    sums_BK2 = cluster_sums(points_BN2, assignment_BN, sizes_BK.shape[1])
    # Gaps are multiplied by the cluster's size, which keeps them integers, so that ties are the same on every device.
    gaps_BN2 = points_BN2 * sizes_BK.gather(1, assignment_BN)[:, :, None] - gather_tokens(sums_BK2, assignment_BN)
    keys_BN = gaps_BN2.square().sum(dim=2) * num_tokens + positions_BN
    least_BK = torch.full_like(sizes_BK, torch.iinfo(torch.int64).max).scatter_reduce_(
        1, assignment_BN, keys_BN, "amin"
    )
    return least_BK % num_tokens, sizes_BK, assignment_BN
