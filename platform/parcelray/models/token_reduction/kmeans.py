"""K-means for the tokens of an image: batched, deterministic, and all arithmetic on the Gram matrix.

An image has a few hundred tokens of a few thousand dimensions. One batched product gives all inner products, [B, N, N]; from then on the
distances of the seeding (Arthur and Vassilvitskii, SODA 2007; greedy: several candidates a step, the best one kept), the assignments and
the norms of the centroids (Lloyd, IEEE TIT 1982) are sums over entries of that matrix, whatever the dimension:

    |x_i - c_j|^2 = G_ii - 2/n_j sum_{m in j} G_im + 1/n_j^2 sum_{m, m' in j} G_mm'.

The centroids themselves are formed once, at the end.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from parcelray.errors import UserError

Seeding = Literal["greedy", "plain"]


class Clusters(NamedTuple):
    """A clustering of the tokens of each image."""

    assignment_BN: Tensor
    """Cluster of each token, int64; every cluster from 0 to k - 1 has a token."""
    sizes_BK: Tensor
    """Tokens of each cluster, int64."""
    inertia_B: Tensor
    """Sum over the tokens of their squared distance to their centroid."""
    iterations: int
    """Lloyd iterations until no token of any image changed its cluster, or the limit."""


def kmeans(
    tokens_BND: Tensor, num_clusters: int, *, seed: int = 0, seeding: Seeding = "greedy", candidates: int | None = None, max_iterations: int = 100
) -> Clusters:
    """Clusters the tokens of each image by squared Euclidean distance; for cosine, normalise them first.

    The same seed gives the same clusters for an image alone and in a batch, on every device up to rounding.

    Args:
        tokens_BND: finite, any floating dtype; the arithmetic is float32.
        num_clusters: k, 1 to N.
        seed: of the seeding.
        seeding: `greedy` tries several candidates a step and keeps the best, as scikit-learn does; `plain` draws one.
        candidates: of the greedy seeding; None: 2 + log k, scikit-learn's.
        max_iterations: limit of Lloyd's iterations; 0: the seeding alone.

    Raises:
        UserError: k is not between 1 and N, or a token is not finite.
    """
    batch, num_tokens, _ = tokens_BND.shape
    if not 1 <= num_clusters <= num_tokens:
        raise UserError(f"{num_clusters} clusters of {num_tokens} tokens are impossible; choose 1 to {num_tokens}.")
    tokens_BND = tokens_BND.float()
    # Distances do not change under a shift, and without the mean that all tokens share, less is lost in the differences.
    centred_BND = tokens_BND - tokens_BND.mean(dim=1, keepdim=True)
    gram_BNN = centred_BND @ centred_BND.transpose(1, 2)
    norms_BN = gram_BNN.diagonal(dim1=1, dim2=2)
    if not bool(norms_BN.isfinite().all()):
        raise UserError("Some tokens are not finite (NaN or infinite), so they cannot be clustered; check the model's precision.")
    distances_BNN = (norms_BN[:, :, None] + norms_BN[:, None, :]).sub_(gram_BNN, alpha=2).clamp_(min=0)
    count = 1 if seeding == "plain" else candidates or 2 + int(math.log(num_clusters))
    seeds_BK = _seed(distances_BNN, num_clusters, seed, count)
    nearest_BKN = distances_BNN.gather(1, seeds_BK[:, :, None].expand(-1, -1, num_tokens))
    assignment_BN = nearest_BKN.argmin(dim=1)
    # A token that is equal to an earlier seed was seeded only because no distance was left; its cluster starts empty.
    assignment_BN.scatter_(1, seeds_BK, torch.arange(num_clusters, device=seeds_BK.device).expand(batch, -1))
    iterations = 0
    while iterations < max_iterations:
        iterations += 1
        scores_BKN, sizes_BK = _scores(gram_BNN, assignment_BN, num_clusters)
        updated_BN = _with_every_cluster(scores_BKN.argmin(dim=1), scores_BKN, norms_BN, num_clusters)
        if torch.equal(updated_BN, assignment_BN):
            break
        assignment_BN = updated_BN
    scores_BKN, sizes_BK = _scores(gram_BNN, assignment_BN, num_clusters)
    own_BN = scores_BKN.gather(1, assignment_BN[:, None]).squeeze(1)
    return Clusters(assignment_BN, sizes_BK, (norms_BN + own_BN).clamp(min=0).sum(dim=1), iterations)


def cluster_sums(tokens_BND: Tensor, assignment_BN: Tensor, num_clusters: int) -> Tensor:
    """Sum of the tokens of each cluster: [B, K, D]."""
    batch, _, width = tokens_BND.shape
    sums_BKD = tokens_BND.new_zeros(batch, num_clusters, width)
    return sums_BKD.scatter_add_(1, assignment_BN[:, :, None].expand_as(tokens_BND), tokens_BND)


def _seed(distances_BNN: Tensor, num_clusters: int, seed: int, candidates: int) -> Tensor:
    """Tokens that the clusters start from, int64 [B, K]."""
    batch, num_tokens, _ = distances_BNN.shape
    device = distances_BNN.device
    # Drawn on the CPU and alike for all images, so that neither the device nor the rest of the batch matters.
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(num_tokens, (), generator=generator))
    draws_KC = torch.rand(num_clusters, candidates, generator=generator).to(device)
    images_B1 = torch.arange(batch, device=device)[:, None]
    seeds_BK = torch.full((batch, num_clusters), first, dtype=torch.int64, device=device)
    closest_BN = distances_BNN[:, first].clone()
    for step in range(1, num_clusters):
        cumulated_BN = closest_BN.cumsum(dim=1)
        chosen_BC = torch.searchsorted(cumulated_BN, draws_KC[step] * cumulated_BN[:, -1:], right=True).clamp_(max=num_tokens - 1)
        if candidates > 1:
            after_BCN = torch.minimum(distances_BNN[images_B1, chosen_BC], closest_BN[:, None])
            best_B = after_BCN.sum(dim=2).argmin(dim=1)
            seeds_BK[:, step] = chosen_BC.gather(1, best_B[:, None]).squeeze(1)
            closest_BN = after_BCN[images_B1.squeeze(1), best_B]
        else:
            seeds_BK[:, step] = chosen_BC.squeeze(1)
            closest_BN = torch.minimum(closest_BN, distances_BNN[images_B1, chosen_BC].squeeze(1))
        # Where all tokens are equal to a seed nothing is left to draw by; any token that is no seed yet will do.
        spent_B = cumulated_BN[:, -1] <= 0
        if bool(spent_B.any()):
            seeds_BK[spent_B, step] = _unused(seeds_BK[spent_B, :step], num_tokens)
    return seeds_BK


def _unused(seeds_BS: Tensor, num_tokens: int) -> Tensor:
    """For each image the first token that is no seed, int64 [B]."""
    taken_BN = torch.zeros(seeds_BS.shape[0], num_tokens, dtype=torch.bool, device=seeds_BS.device).scatter_(1, seeds_BS, True)
    return taken_BN.int().argmin(dim=1)


def _scores(gram_BNN: Tensor, assignment_BN: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Squared distance of each token to each centroid without the token's own norm [B, K, N], and the clusters' sizes [B, K]."""
    batch, num_tokens = assignment_BN.shape
    sizes_BK = torch.zeros(batch, num_clusters, dtype=torch.int64, device=gram_BNN.device)
    sizes_BK.scatter_add_(1, assignment_BN, torch.ones_like(assignment_BN))
    rows_BN = (assignment_BN + num_clusters * torch.arange(batch, device=gram_BNN.device)[:, None]).flatten()
    sums_BKN = gram_BNN.new_zeros(batch * num_clusters, num_tokens).index_add_(0, rows_BN, gram_BNN.flatten(0, 1)).view(batch, num_clusters, num_tokens)
    counts_BK = sizes_BK.clamp(min=1).to(gram_BNN.dtype)
    # Of each token the inner product with its own cluster's sum; added up by cluster, the squared norm of that sum.
    own_BN = sums_BKN.gather(1, assignment_BN[:, None]).squeeze(1)
    norms_BK = gram_BNN.new_zeros(batch, num_clusters).scatter_add_(1, assignment_BN, own_BN) / counts_BK.square()
    return sums_BKN.mul_(-2 / counts_BK[:, :, None]).add_(norms_BK[:, :, None]), sizes_BK


def _with_every_cluster(assignment_BN: Tensor, scores_BKN: Tensor, norms_BN: Tensor, num_clusters: int) -> Tensor:
    """Gives each empty cluster the token that is farthest from its centroid, out of clusters that keep another one."""
    sizes_BK = torch.zeros(assignment_BN.shape[0], num_clusters, dtype=torch.int64, device=assignment_BN.device)
    sizes_BK.scatter_add_(1, assignment_BN, torch.ones_like(assignment_BN))
    for image, cluster in (sizes_BK == 0).nonzero().tolist():
        own_N = assignment_BN[image]
        distances_N = norms_BN[image] + scores_BKN[image].gather(0, own_N[None]).squeeze(0)
        distances_N = distances_N.masked_fill(sizes_BK[image, own_N] <= 1, -math.inf)
        token = int(distances_N.argmax())
        sizes_BK[image, own_N[token]] -= 1
        sizes_BK[image, cluster] = 1
        assignment_BN[image, token] = cluster
    return assignment_BN
