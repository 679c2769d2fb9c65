"""K-means for the tokens of an image: batched, deterministic, with all arithmetic on the Gram matrix.

An image has a few hundred tokens of a few thousand dimensions. One batched product gives all inner products, [B, N, N].
All later quantities are sums over entries of that matrix, independent of the dimension: the distances of the seeding
(Arthur and Vassilvitskii, SODA 2007; greedy: several candidates per step, the best one is kept), the assignments, and
the norms of the centroids (Lloyd, IEEE TIT 1982):

    |x_i - c_j|^2 = G_ii - 2/n_j sum_{m in j} G_im + 1/n_j^2 sum_{m, m' in j} G_mm'.

Shape suffixes: B images, N tokens, K clusters, C candidates of the seeding, D width of a token.
"""

import importlib.util
import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from parcelray.errors import NotFiniteError, UserError

Seeding = Literal["greedy", "plain"]

_BLOCKS = 4
_EPSILON = torch.finfo(torch.float32).eps


class Clusters(NamedTuple):
    """A clustering of the tokens of each image."""

    assignment_BN: Tensor
    """Cluster of each token, int64; none of the clusters 0 to K - 1 is empty."""
    sizes_BK: Tensor
    """Number of tokens of each cluster, int64."""
    inertia_B: Tensor
    """Sum over the tokens of the squared distance to their centroid."""
    iterations: int
    """Number of Lloyd iterations until no token of any image changed its cluster, or the limit.

    On a GPU, convergence is checked every few iterations, so the number may be up to three higher.
    """


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
    """Clusters the tokens of each image by squared Euclidean distance; for cosine distance, normalise them first.

    No gradients are tracked, because none pass through an assignment. The same seed gives an image the same clusters
    alone and in a batch, and on every device up to rounding.

    Args:
        tokens_BND: finite tokens of any floating dtype; the arithmetic is float32. On a GPU, half-precision tokens are
            rounded to half precision again after the subtraction of their mean; their products are exact and are
            summed in float32.
        num_clusters: K, 1 to N.
        seed: seed of the seeding.
        seeding: `greedy` draws several candidates per step and keeps the best, like scikit-learn; `plain` draws one.
        candidates: candidates per step of the greedy seeding; None: 2 + log K, like scikit-learn.
        max_iterations: limit of Lloyd's iterations; 0: only the seeding.

    Raises:
        UserError: K is not between 1 and N.
        NotFiniteError: a token is not finite.
    """
    num_tokens = tokens_BND.shape[1]
    if not 1 <= num_clusters <= num_tokens:
        raise UserError(f"{num_tokens} tokens cannot form {num_clusters} clusters; choose 1 to {num_tokens} clusters.")
    if not _multiplies_halves(tokens_BND):
        tokens_BND = tokens_BND.float()
    # Distances do not change when all tokens are shifted, and without the common mean, less precision is lost in the
    # differences.
    mean_B1D = tokens_BND.mean(dim=1, keepdim=True)
    gram_BNN = _gram(tokens_BND - mean_B1D)
    norms_BN = gram_BNN.diagonal(dim1=1, dim2=2)
    # The maximum of values that include a NaN is NaN.
    if not math.isfinite(float(norms_BN.amax())):
        raise NotFiniteError(
            "Some tokens are not finite (NaN or infinite) and cannot be clustered; check the model's precision."
        )
    count = 1 if seeding == "plain" else candidates or 2 + int(math.log(num_clusters))
    first, draws_KC = _draws(num_tokens, num_clusters, count, seed, gram_BNN.device)
    shift_B = mean_B1D.float().square().sum(dim=(1, 2))
    if _has_kernels(gram_BNN):
        from parcelray.models.token_reduction import kmeans_triton

        seeded_BN = kmeans_triton.seed_clusters(gram_BNN, first, draws_KC)
        lloyd = kmeans_triton.iterate(gram_BNN, seeded_BN, num_clusters, _EPSILON, shift_B, max_iterations)
        inertia_B = (norms_BN.sum(dim=1) - lloyd.explained_B).clamp_(min=0)
        return Clusters(lloyd.assignment_BN.long(), lloyd.sizes_BK.long(), inertia_B, lloyd.iterations)
    assignment_BN = _seed(gram_BNN, norms_BN, first, draws_KC)
    # Rounding error of one number. The second term is the rounding error of the shift, which matters for tokens that
    # differ only by rounding.
    rounding_BN = _EPSILON * (norms_BN + _EPSILON * shift_B[:, None])
    assignment_BN, iterations = _iterate(gram_BNN, assignment_BN, num_clusters, rounding_BN, max_iterations)
    sizes_BK = _sizes(assignment_BN, num_clusters)
    own_BN = _scores(gram_BNN, assignment_BN, sizes_BK).gather(1, assignment_BN[:, None]).squeeze(1)
    return Clusters(assignment_BN, sizes_BK, (norms_BN + own_BN).clamp(min=0).sum(dim=1), iterations)


def cluster_sums(tokens_BND: Tensor, assignment_BN: Tensor, num_clusters: int) -> Tensor:
    """Returns the sum of the tokens of each cluster, [B, K, D]; float32 unless the tokens are integers."""
    batch, _, width = tokens_BND.shape
    if tokens_BND.is_cuda and tokens_BND.is_floating_point():
        # On a GPU, scattered additions have no fixed order; a matrix product is reproducible.
        members_BKN = assignment_BN[:, None] == torch.arange(num_clusters, device=assignment_BN.device)[:, None]
        return _product(members_BKN.to(tokens_BND.dtype), tokens_BND)
    if tokens_BND.is_floating_point():
        tokens_BND = tokens_BND.float()
    sums_BKD = tokens_BND.new_zeros(batch, num_clusters, width)
    return sums_BKD.scatter_add_(1, assignment_BN[:, :, None].expand_as(tokens_BND), tokens_BND)


@lru_cache(maxsize=64)
def _draws(num_tokens: int, num_clusters: int, candidates: int, seed: int, device: torch.device) -> tuple[int, Tensor]:
    """Returns the first seed token of every image, and the uniform draws in [0, 1) of each step, [K, C]."""
    # Drawn on the CPU, the same for all images, so that the result depends neither on the device nor on the batch.
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(num_tokens, (), generator=generator))
    return first, torch.rand(num_clusters, candidates, generator=generator).to(device)


def _seed(gram_BNN: Tensor, norms_BN: Tensor, first: int, draws_KC: Tensor) -> Tensor:
    """Returns the nearest seed of each token, int64 [B, N]; every seed has a token."""
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
    # Each seed token belongs to its own cluster, even if it is equal to an earlier seed.
    return assignment_BN.scatter_(1, seeds_BK, torch.arange(num_clusters, device=device).expand(batch, -1))


def _distinct(seeds_BK: Tensor, spent_BK: Tensor, num_tokens: int) -> Tensor:
    """Returns distinct seeds: those drawn while all distances were 0 are replaced by unused tokens, lowest first.

    Args:
        seeds_BK: seeds as drawn.
        spent_BK: True for steps at which every token was equal to an earlier seed, so that the draw is meaningless.
        num_tokens: N.
    """
    # After the first spent step all steps are spent, so the seeds before it are kept.
    free_BN = torch.ones(len(seeds_BK), num_tokens, dtype=torch.int8, device=seeds_BK.device)
    free_BN.scatter_(1, torch.where(spent_BK, seeds_BK[:, :1], seeds_BK), 0)
    unused_BN = free_BN.argsort(dim=1, descending=True, stable=True)
    return torch.where(spent_BK, unused_BN.gather(1, (spent_BK.cumsum(dim=1) - 1).clamp_(min=0)), seeds_BK)


def _iterate(
    gram_BNN: Tensor, assignment_BN: Tensor, num_clusters: int, rounding_BN: Tensor, max_iterations: int
) -> tuple[Tensor, int]:
    """Runs Lloyd's iterations until no token of any image moves; returns the assignment and their number."""
    for iterations in range(1, max_iterations + 1):
        updated_BN = _moved(gram_BNN, assignment_BN, num_clusters, rounding_BN)
        if torch.equal(updated_BN, assignment_BN):
            return assignment_BN, iterations
        assignment_BN = updated_BN
    return assignment_BN, max_iterations


def _moved(gram_BNN: Tensor, assignment_BN: Tensor, num_clusters: int, rounding_BN: Tensor) -> Tensor:
    """Runs one Lloyd iteration: each token moves to the nearest centroid if that is nearer than its own one.

    No cluster stays empty.
    """
    sizes_BK = _sizes(assignment_BN, num_clusters)
    scores_BKN = _scores(gram_BNN, assignment_BN, sizes_BK)
    # A token at equal distance (up to rounding) from two centroids would otherwise move back and forth forever.
    advantage_BN = rounding_BN * sizes_BK.amax(dim=1, keepdim=True)
    scores_BKN.scatter_add_(1, assignment_BN[:, None], -advantage_BN[:, None])
    moved_BN = scores_BKN.argmin(dim=1)
    sizes_BK = _sizes(moved_BN, num_clusters)
    if bool(sizes_BK.all()):
        return moved_BN
    distances_BN = gram_BNN.diagonal(dim1=1, dim2=2) + scores_BKN.gather(1, moved_BN[:, None]).squeeze(1)
    return _with_every_cluster(moved_BN, distances_BN, sizes_BK)


def _sizes(assignment_BN: Tensor, num_clusters: int) -> Tensor:
    """Returns the number of tokens of each cluster, int64 [B, K]."""
    sizes_BK = torch.zeros(assignment_BN.shape[0], num_clusters, dtype=torch.int64, device=assignment_BN.device)
    return sizes_BK.scatter_add_(1, assignment_BN, torch.ones_like(assignment_BN))


def _scores(gram_BNN: Tensor, assignment_BN: Tensor, sizes_BK: Tensor) -> Tensor:
    """Returns the squared distance of each token to each centroid minus the token's squared norm, [B, K, N]."""
    batch, num_tokens = assignment_BN.shape
    num_clusters = sizes_BK.shape[1]
    rows_BN = (assignment_BN + num_clusters * torch.arange(batch, device=gram_BNN.device)[:, None]).flatten()
    sums_BKN = (
        gram_BNN.new_zeros(batch * num_clusters, num_tokens)
        .index_add_(0, rows_BN, gram_BNN.flatten(0, 1))
        .view(batch, num_clusters, num_tokens)
    )
    counts_BK = sizes_BK.clamp(min=1).to(gram_BNN.dtype)
    # Inner product of each token with the sum of its cluster. Summed by cluster, this is the squared norm of that sum.
    own_BN = sums_BKN.gather(1, assignment_BN[:, None]).squeeze(1)
    norms_BK = gram_BNN.new_zeros(batch, num_clusters).scatter_add_(1, assignment_BN, own_BN) / counts_BK.square()
    return sums_BKN.mul_(-2 / counts_BK[:, :, None]).add_(norms_BK[:, :, None])


def _with_every_cluster(assignment_BN: Tensor, distances_BN: Tensor, sizes_BK: Tensor) -> Tensor:
    """Gives each empty cluster the token farthest from its centroid, from clusters with more than one token."""
    num_tokens, num_clusters = assignment_BN.shape[1], sizes_BK.shape[1]
    # Each cluster keeps its nearest token; among equally near ones, the last.
    least_BK = torch.full(sizes_BK.shape, torch.inf, device=sizes_BK.device).scatter_reduce_(
        1, assignment_BN, distances_BN, "amin"
    )
    positions_BN = torch.arange(num_tokens, device=sizes_BK.device).expand_as(assignment_BN)
    nearest_BN = torch.where(distances_BN == least_BK.gather(1, assignment_BN), positions_BN, -1)
    stays_BK = torch.full_like(sizes_BK, -1).scatter_reduce_(1, assignment_BN, nearest_BN, "amax")
    may_leave_BN = positions_BN != stays_BK.gather(1, assignment_BN)
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
    """Whether the steps run as GPU kernels; PyTorch's builds for Linux include their compiler, Triton."""
    return values.is_cuda and importlib.util.find_spec("triton") is not None


def _multiplies_halves(tokens: Tensor) -> bool:
    """Whether the device multiplies numbers of this half precision natively and sums in float32."""
    return tokens.is_cuda and tokens.dtype in (torch.bfloat16, torch.float16)


def _product(left_BMN: Tensor, right_BNP: Tensor) -> Tensor:
    """Returns the float32 product [B, M, P] of float32 or half-precision factors."""
    return (
        torch.bmm(left_BMN, right_BNP, out_dtype=torch.float32)
        if _multiplies_halves(left_BMN)
        else left_BMN @ right_BNP
    )


def _gram(tokens_BND: Tensor) -> Tensor:
    """Returns all inner products, float32 [B, N, N]."""
    if tokens_BND.is_cuda:
        return _product(tokens_BND, tokens_BND.transpose(1, 2))
    # The matrix is symmetric, so 10 of its 4 x 4 blocks suffice. On a GPU, four small products would take longer than
    # one.
    batch, num_tokens, _ = tokens_BND.shape
    gram_BNN = tokens_BND.new_empty(batch, num_tokens, num_tokens)
    size = -(-num_tokens // _BLOCKS)
    for start in range(0, num_tokens, size):
        rows = slice(start, start + size)
        block = tokens_BND[:, rows] @ tokens_BND[:, start:].transpose(1, 2)
        gram_BNN[:, rows, start:] = block
        gram_BNN[:, start:, rows] = block.transpose(1, 2)
    return gram_BNN
