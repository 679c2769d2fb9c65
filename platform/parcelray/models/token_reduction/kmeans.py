"""K-means for the tokens of an image: batched, deterministic, and all arithmetic on the Gram matrix.

An image has a few hundred tokens of a few thousand dimensions. One batched product gives all inner products, [B, N, N];
from then on the distances of the seeding (Arthur and Vassilvitskii, SODA 2007; greedy: several candidates a step, the
best one kept), the assignments and the norms of the centroids (Lloyd, IEEE TIT 1982) are sums over entries of that
matrix, whatever the dimension:

    |x_i - c_j|^2 = G_ii - 2/n_j sum_{m in j} G_im + 1/n_j^2 sum_{m, m' in j} G_mm'.

The centroids themselves are formed once, at the end.
"""

import importlib.util
import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from parcelray.errors import UserError

Seeding = Literal["greedy", "plain"]

_BLOCKS = 4
_EPSILON = torch.finfo(torch.float32).eps


class Clusters(NamedTuple):
    """A clustering of the tokens of each image."""

    assignment_BN: Tensor
    """Cluster of each token, int64; every cluster from 0 to k - 1 has a token."""
    sizes_BK: Tensor
    """Tokens of each cluster, int64."""
    inertia_B: Tensor
    """Sum over the tokens of their squared distance to their centroid."""
    iterations: int
    """Lloyd iterations until no token of any image changed its cluster, or the limit; on a GPU, which is asked every few, up to three more."""


@torch.no_grad()
def kmeans(
    tokens_BND: Tensor,
    num_clusters: int,
    *,
    seed: int = 0,
    seeding: Seeding = "greedy",
    candidates: int | None = None,
    max_iterations: int = 100,
) -> Clusters:
    """Clusters the tokens of each image by squared Euclidean distance; for cosine, normalise them first.

    No gradient passes through a choice of clusters, so none is tracked. The same seed gives the same clusters for an
    image alone and in a batch, on every device up to rounding.

    Args:
        tokens_BND: finite, any floating dtype; the arithmetic is float32. Tokens of half precision are on a GPU rounded
            to it again after their mean was taken off; their products are exact, and added up in float32.
        num_clusters: k, 1 to N.
        seed: of the seeding.
        seeding: `greedy` tries several candidates a step and keeps the best, as scikit-learn does; `plain` draws one.
        candidates: of the greedy seeding; None: 2 + log k, scikit-learn's.
        max_iterations: limit of Lloyd's iterations; 0: the seeding alone.

    Raises:
        UserError: k is not between 1 and N, or a token is not finite.
    """
    num_tokens = tokens_BND.shape[1]
    if not 1 <= num_clusters <= num_tokens:
        raise UserError(f"{num_clusters} clusters of {num_tokens} tokens are impossible; choose 1 to {num_tokens}.")
    if not _multiplies_halves(tokens_BND):
        tokens_BND = tokens_BND.float()
    # Distances do not change under a shift, and without the mean that all tokens share, less is lost in the
    # differences.
    mean_B1D = tokens_BND.mean(dim=1, keepdim=True)
    gram_BNN = _gram(tokens_BND - mean_B1D)
    norms_BN = gram_BNN.diagonal(dim1=1, dim2=2)
    # The largest of numbers with a NaN among them is a NaN.
    if not math.isfinite(float(norms_BN.amax())):
        raise UserError(
            "Some tokens are not finite (NaN or infinite), so they cannot be clustered; check the model's precision."
        )
    count = 1 if seeding == "plain" else candidates or 2 + int(math.log(num_clusters))
    first, draws_KC = _draws(num_tokens, num_clusters, count, seed, gram_BNN.device)
    shift_B = mean_B1D.float().square().sum(dim=(1, 2))
    if _has_kernels(gram_BNN):
        from parcelray.models.token_reduction import kmeans_triton

        lloyd = kmeans_triton.iterate(
            gram_BNN, kmeans_triton.seed_clusters(gram_BNN, first, draws_KC), num_clusters, _EPSILON, shift_B, max_iterations
        )  # fmt: skip
        inertia_B = (norms_BN.sum(dim=1) - lloyd.explained_B).clamp_(min=0)
        return Clusters(lloyd.assignment_BN.long(), lloyd.sizes_BK.long(), inertia_B, lloyd.iterations)
    assignment_BN = _seed(gram_BNN, norms_BN, first, draws_KC)
    # What a sum of one number may be off by; for tokens that differ by no more than their own rounding, that of the
    # shift besides.
    rounding_BN = _EPSILON * (norms_BN + _EPSILON * shift_B[:, None])
    assignment_BN, iterations = _iterate(gram_BNN, assignment_BN, num_clusters, rounding_BN, max_iterations)
    sizes_BK = _sizes(assignment_BN, num_clusters)
    own_BN = _scores(gram_BNN, assignment_BN, sizes_BK).gather(1, assignment_BN[:, None]).squeeze(1)
    return Clusters(assignment_BN, sizes_BK, (norms_BN + own_BN).clamp(min=0).sum(dim=1), iterations)


def cluster_sums(tokens_BND: Tensor, assignment_BN: Tensor, num_clusters: int) -> Tensor:
    """Sum of the tokens of each cluster: [B, K, D], float32 unless the tokens are whole numbers."""
    batch, _, width = tokens_BND.shape
    if tokens_BND.is_cuda and tokens_BND.is_floating_point():
        # There scattered additions come in any order; a product is the same every time.
        members_BKN = assignment_BN[:, None] == torch.arange(num_clusters, device=assignment_BN.device)[:, None]
        return _product(members_BKN.to(tokens_BND.dtype), tokens_BND)
    if tokens_BND.is_floating_point():
        tokens_BND = tokens_BND.float()
    sums_BKD = tokens_BND.new_zeros(batch, num_clusters, width)
    return sums_BKD.scatter_add_(1, assignment_BN[:, :, None].expand_as(tokens_BND), tokens_BND)


@lru_cache(maxsize=64)
def _draws(num_tokens: int, num_clusters: int, candidates: int, seed: int, device: torch.device) -> tuple[int, Tensor]:
    """The token that every image's seeding starts from, and the draws of each step, uniform from 0 to 1: [K, C]."""
    # Drawn on the CPU and alike for all images, so that neither the device nor the rest of the batch matters.
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(num_tokens, (), generator=generator))
    return first, torch.rand(num_clusters, candidates, generator=generator).to(device)


def _seed(gram_BNN: Tensor, norms_BN: Tensor, first: int, draws_KC: Tensor) -> Tensor:
    """The nearest seed of each token, int64 [B, N]; every seed has a token."""
    batch, num_tokens, _ = gram_BNN.shape
    num_clusters, candidates = draws_KC.shape
    device = gram_BNN.device
    distances_BNN = (norms_BN[:, :, None] + norms_BN[:, None, :]).sub_(gram_BNN, alpha=2).clamp_(min=0)
    images_B1 = torch.arange(batch, device=device)[:, None]
    seeds_BK = torch.full((batch, num_clusters), first, dtype=torch.int64, device=device)
    totals_BK = distances_BNN.new_ones(batch, num_clusters)
    closest_BN = distances_BNN[:, first]
    for step in range(1, num_clusters):
        cumulated_BN = closest_BN.cumsum(dim=1)
        total_B1 = cumulated_BN[:, -1:]
        totals_BK[:, step : step + 1] = total_B1
        chosen_BC = torch.searchsorted(cumulated_BN, draws_KC[step] * total_B1, right=True).clamp_(max=num_tokens - 1)
        if candidates > 1:
            after_BCN = torch.minimum(distances_BNN[images_B1, chosen_BC], closest_BN[:, None])
            best_B = after_BCN.sum(dim=2).argmin(dim=1)
            seeds_BK[:, step] = chosen_BC.gather(1, best_B[:, None]).squeeze(1)
            closest_BN = after_BCN[images_B1.squeeze(1), best_B]
        else:
            seeds_BK[:, step] = chosen_BC.squeeze(1)
            closest_BN = torch.minimum(closest_BN, distances_BNN[images_B1, chosen_BC].squeeze(1))
    seeds_BK = _distinct(seeds_BK, totals_BK <= 0, num_tokens)
    assignment_BN = distances_BNN.gather(1, seeds_BK[:, :, None].expand(-1, -1, num_tokens)).argmin(dim=1)
    # A token that is equal to an earlier seed was seeded only because no distance was left; its cluster starts empty.
    return assignment_BN.scatter_(1, seeds_BK, torch.arange(num_clusters, device=device).expand(batch, -1))


def _distinct(seeds_BK: Tensor, spent_BK: Tensor, num_tokens: int) -> Tensor:
    """Seeds, and where all tokens were equal to a seed already and nothing was left to draw by, the first tokens that are none."""
    # Once spent, always spent: the seeds before are those to keep.
    free_BN = torch.ones(len(seeds_BK), num_tokens, dtype=torch.int8, device=seeds_BK.device)
    free_BN.scatter_(1, torch.where(spent_BK, seeds_BK[:, :1], seeds_BK), 0)
    unused_BN = free_BN.argsort(dim=1, descending=True, stable=True)
    return torch.where(spent_BK, unused_BN.gather(1, (spent_BK.cumsum(dim=1) - 1).clamp_(min=0)), seeds_BK)


def _iterate(
    gram_BNN: Tensor, assignment_BN: Tensor, num_clusters: int, rounding_BN: Tensor, max_iterations: int
) -> tuple[Tensor, int]:
    """Lloyd's iterations until no token of any image moves, and their number."""
    for iterations in range(1, max_iterations + 1):
        updated_BN = _moved(gram_BNN, assignment_BN, num_clusters, rounding_BN)
        if torch.equal(updated_BN, assignment_BN):
            return assignment_BN, iterations
        assignment_BN = updated_BN
    return assignment_BN, max_iterations


def _moved(gram_BNN: Tensor, assignment_BN: Tensor, num_clusters: int, rounding_BN: Tensor) -> Tensor:
    """An iteration of Lloyd: each token in the cluster with the nearest centroid, its own one where no other is nearer; no cluster empty."""
    sizes_BK = _sizes(assignment_BN, num_clusters)
    scores_BKN = _scores(gram_BNN, assignment_BN, sizes_BK)
    # Where two centroids are equal but for the rounding of their sums, moving to and fro would never end.
    advantage_BN = rounding_BN * sizes_BK.amax(dim=1, keepdim=True)
    scores_BKN.scatter_add_(1, assignment_BN[:, None], -advantage_BN[:, None])
    moved_BN = scores_BKN.argmin(dim=1)
    sizes_BK = _sizes(moved_BN, num_clusters)
    if bool(sizes_BK.all()):
        return moved_BN
    distances_BN = gram_BNN.diagonal(dim1=1, dim2=2) + scores_BKN.gather(1, moved_BN[:, None]).squeeze(1)
    return _with_every_cluster(moved_BN, distances_BN, sizes_BK)


def _sizes(assignment_BN: Tensor, num_clusters: int) -> Tensor:
    """Tokens of each cluster, int64 [B, K]."""
    sizes_BK = torch.zeros(assignment_BN.shape[0], num_clusters, dtype=torch.int64, device=assignment_BN.device)
    return sizes_BK.scatter_add_(1, assignment_BN, torch.ones_like(assignment_BN))


def _scores(gram_BNN: Tensor, assignment_BN: Tensor, sizes_BK: Tensor) -> Tensor:
    """Squared distance of each token to each centroid without the token's own norm: [B, K, N]."""
    batch, num_tokens = assignment_BN.shape
    num_clusters = sizes_BK.shape[1]
    rows_BN = (assignment_BN + num_clusters * torch.arange(batch, device=gram_BNN.device)[:, None]).flatten()
    sums_BKN = (
        gram_BNN.new_zeros(batch * num_clusters, num_tokens)
        .index_add_(0, rows_BN, gram_BNN.flatten(0, 1))
        .view(batch, num_clusters, num_tokens)
    )
    counts_BK = sizes_BK.clamp(min=1).to(gram_BNN.dtype)
    # Of each token the inner product with its own cluster's sum; added up by cluster, the squared norm of that sum.
    own_BN = sums_BKN.gather(1, assignment_BN[:, None]).squeeze(1)
    norms_BK = gram_BNN.new_zeros(batch, num_clusters).scatter_add_(1, assignment_BN, own_BN) / counts_BK.square()
    return sums_BKN.mul_(-2 / counts_BK[:, :, None]).add_(norms_BK[:, :, None])


def _with_every_cluster(assignment_BN: Tensor, distances_BN: Tensor, sizes_BK: Tensor) -> Tensor:
    """Gives each empty cluster the token that is farthest from its centroid, out of clusters that keep another one."""
    num_tokens, num_clusters = assignment_BN.shape[1], sizes_BK.shape[1]
    # The last that a cluster could give is its nearest one; of equally near ones the last.
    least_BK = torch.full(sizes_BK.shape, torch.inf, device=sizes_BK.device).scatter_reduce_(
        1, assignment_BN, distances_BN, "amin"
    )
    places_BN = torch.arange(num_tokens, device=sizes_BK.device).expand_as(assignment_BN)
    nearest_BN = torch.where(distances_BN == least_BK.gather(1, assignment_BN), places_BN, -1)
    stays_BK = torch.full_like(sizes_BK, -1).scatter_reduce_(1, assignment_BN, nearest_BN, "amax")
    may_leave_BN = places_BN != stays_BK.gather(1, assignment_BN)
    farthest_BK = (
        distances_BN.masked_fill(~may_leave_BN, -torch.inf)
        .sort(dim=1, descending=True, stable=True)
        .indices[:, :num_clusters]
    )
    empty_BK = sizes_BK == 0
    receivers_BK = empty_BK.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    is_given_BK = torch.arange(num_clusters, device=sizes_BK.device) < empty_BK.sum(dim=1, keepdim=True)
    return assignment_BN.scatter(
        1, farthest_BK, torch.where(is_given_BK, receivers_BK, assignment_BN.gather(1, farthest_BK))
    )


def _has_kernels(values: Tensor) -> bool:
    """Whether the steps run as kernels of a GPU, which PyTorch's builds for Linux bring the compiler for."""
    return values.is_cuda and importlib.util.find_spec("triton") is not None


def _multiplies_halves(tokens: Tensor) -> bool:
    """Whether the device has units that multiply numbers of this half precision and add up in float32."""
    return tokens.is_cuda and tokens.dtype in (torch.bfloat16, torch.float16)


def _product(left_BMN: Tensor, right_BNP: Tensor) -> Tensor:
    """Float32 [B, M, P] of either float32 or halves."""
    return (
        torch.bmm(left_BMN, right_BNP, out_dtype=torch.float32)
        if _multiplies_halves(left_BMN)
        else left_BMN @ right_BNP
    )


def _gram(tokens_BND: Tensor) -> Tensor:
    """All inner products, float32 [B, N, N]."""
    if tokens_BND.is_cuda:
        return _product(tokens_BND, tokens_BND.transpose(1, 2))
    # The matrix is symmetric, and of 4 x 4 blocks 10 say everything. A GPU would wait for four small products longer
    # than for one.
    batch, num_tokens, _ = tokens_BND.shape
    gram_BNN = tokens_BND.new_empty(batch, num_tokens, num_tokens)
    size = -(-num_tokens // _BLOCKS)
    for start in range(0, num_tokens, size):
        rows = slice(start, start + size)
        block = tokens_BND[:, rows] @ tokens_BND[:, start:].transpose(1, 2)
        gram_BNN[:, rows, start:] = block
        gram_BNN[:, start:, rows] = block.transpose(1, 2)
    return gram_BNN
