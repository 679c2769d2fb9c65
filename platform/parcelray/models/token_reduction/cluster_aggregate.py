"""Cluster & Aggregate (arXiv 2504.17892): K-means++ on the projected visual tokens, one output token per cluster, its members' mean.

The paper names the embedding similarity and the mean; the iterations, the order and the positions of the aggregates are not printed
where they could be read, so they are choices here: until no token moves, in the order of the members' mean place.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.models.token_reduction.base import Reduction, TokenReducer
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
        clusters = kmeans(features_BND, num_visual_tokens, seed=self.seed, seeding=self.seeding, max_iterations=self.max_iterations)
        weights_BN1 = tokens_BND.float().norm(dim=2, keepdim=True) if self.weighting == "norm" else torch.ones_like(tokens_BND[:, :, :1], dtype=torch.float32)
        sums_BKD = cluster_sums(tokens_BND.float() * weights_BN1, clusters.assignment_BN, num_visual_tokens)
        totals_BK1 = cluster_sums(weights_BN1, clusters.assignment_BN, num_visual_tokens).clamp(min=torch.finfo(torch.float32).tiny)
        merged = Reduction((sums_BKD / totals_BK1).to(tokens_BND.dtype), *_places(clusters.assignment_BN, clusters.sizes_BK))
        if self.order == "position":
            return in_order(merged)
        drawn_K = torch.randperm(num_visual_tokens, generator=torch.Generator().manual_seed(self.seed))
        return reordered(merged, drawn_K.to(tokens_BND.device).expand(tokens_BND.shape[0], -1))


def _places(assignment_BN: Tensor, sizes_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The member nearest to the mean place of each cluster, with sizes and assignment."""
    places_BN1 = torch.arange(assignment_BN.shape[1], device=assignment_BN.device, dtype=torch.float32).expand_as(assignment_BN)[:, :, None]
    means_BK = cluster_sums(places_BN1.contiguous(), assignment_BN, sizes_BK.shape[1]).squeeze(2) / sizes_BK
    gaps_BN = (places_BN1.squeeze(2) - means_BK.gather(1, assignment_BN)).abs()
    members_BKN = assignment_BN[:, None] == torch.arange(sizes_BK.shape[1], device=assignment_BN.device)[None, :, None]
    return gaps_BN[:, None].masked_fill(~members_BKN, torch.inf).argmin(dim=2), sizes_BK, assignment_BN
