"""Cluster & Aggregate (arXiv 2504.17892): K-means++ on the projected visual tokens, one output token per cluster, its members' mean.

The paper names the embedding similarity and the mean; the iterations, the order and the positions of the aggregates are
not printed where they could be read, so they are choices here: until no token moves, and in the place of the member
nearest to the members' mean row and column.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import Reduction, TokenReducer, grid_side, taken
from parcelray.models.token_reduction.context import ReductionContext
from parcelray.models.token_reduction.kmeans import Seeding, cluster_sums, kmeans
from parcelray.models.token_reduction.merging import in_order, reordered


@dataclass(frozen=True)
class ClusterAggregate(TokenReducer):
    """Means of clusters.

    Args:
        metric: `euclidean` on the tokens as they are, or `cosine`: on the tokens at length 1.
        order: of the output: by the `position` of the members, or `random`, seeded.
        weighting: `mean`: every member alike; `norm`: by its length.
        seeding: see `kmeans`.
        max_iterations: see `kmeans`.
        seed: of the seeding.
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
        merged = Reduction(means_BKD.to(tokens_BND.dtype), *_places(clusters.assignment_BN, clusters.sizes_BK))
        if self.order == "position":
            return in_order(merged)
        drawn_K = torch.randperm(num_visual_tokens, generator=torch.Generator().manual_seed(self.seed))
        return reordered(merged, drawn_K.to(tokens_BND.device).expand(tokens_BND.shape[0], -1))


def _places(assignment_BN: Tensor, sizes_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The member nearest to the mean row and column of each cluster, of equally near ones the first; with sizes and assignment."""
    num_tokens = assignment_BN.shape[1]
    side = grid_side(num_tokens)
    places_BN = torch.arange(num_tokens, device=assignment_BN.device).expand_as(assignment_BN)
    points_BN2 = torch.stack([places_BN // side, places_BN % side], dim=2)
    sums_BK2 = cluster_sums(points_BN2, assignment_BN, sizes_BK.shape[1])
    # Gaps times the cluster's size are whole numbers, so equally near members are so on every device.
    gaps_BN2 = points_BN2 * sizes_BK.gather(1, assignment_BN)[:, :, None] - taken(sums_BK2, assignment_BN)
    keys_BN = gaps_BN2.square().sum(dim=2) * num_tokens + places_BN
    least_BK = torch.full_like(sizes_BK, torch.iinfo(torch.int64).max).scatter_reduce_(
        1, assignment_BN, keys_BN, "amin"
    )
    return least_BK % num_tokens, sizes_BK, assignment_BN
