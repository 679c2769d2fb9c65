"""The steps of `kmeans` as GPU kernels: a hundred small operations per image would be dominated by launch overhead.

The seeding is one kernel: one program per image keeps the distances to the nearest seed in registers from the first
draw to the last. An iteration of Lloyd is three kernels: the sums of Gram rows by cluster, the nearest centroid of each
token, and the filling of clusters that lost all their tokens. No kernel adds floating-point numbers atomically, so the
result is reproducible.

Shape suffixes: B images, N tokens, K clusters, C candidates of the seeding, J blocks of tokens, I iterations.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHECK_EVERY = 4
"""Iterations between convergence checks; at each check the CPU waits for the GPU."""
_COLUMNS, _ROWS, _CLUSTERS = 32, 64, 64
_MIN_CANDIDATES = 2


class Lloyd(NamedTuple):
    """The result of Lloyd's iterations."""

    assignment_BN: Tensor
    """Cluster of each token, int32."""
    sizes_BK: Tensor
    """Number of tokens of each cluster, int32."""
    explained_B: Tensor
    """Sum over the clusters of size times squared norm of the centroid.

    The inertia is the sum of the squared norms of the tokens minus this.
    """
    iterations: int


def seed_clusters(gram_BNN: Tensor, first: int, draws_KC: Tensor) -> Tensor:
    """Runs K-means++ seeding with the best of C candidates per step.

    If all tokens are equal to a seed, the unused tokens with the lowest positions become seeds.

    Args:
        gram_BNN: inner products, float32, contiguous.
        first: first seed token of every image.
        draws_KC: uniform draws from 0 to 1.

    Returns:
        Nearest seed of each token, int32 [B, N]; every seed has a token.
    """
    batch, num_tokens, _ = gram_BNN.shape
    num_clusters, candidates = draws_KC.shape
    assignment_BN = torch.empty(batch, num_tokens, dtype=torch.int32, device=gram_BNN.device)
    block = triton.next_power_of_2(num_tokens)
    _seed[(batch,)](
        gram_BNN, draws_KC, assignment_BN, first, num_tokens, num_clusters, candidates,
        TOKENS=block, CANDIDATES=max(_MIN_CANDIDATES, triton.next_power_of_2(candidates)),
        num_warps=8 if block <= 1024 else 16,
    )  # fmt: skip
    return assignment_BN


def iterate(
    gram_BNN: Tensor, assignment_BN: Tensor, num_clusters: int, epsilon: float, shift_B: Tensor, max_iterations: int
) -> Lloyd:
    """Runs Lloyd's iterations until no token of any image moves.

    A token only moves to a nearer centroid, and no cluster stays empty.

    Args:
        gram_BNN: inner products, float32, contiguous.
        assignment_BN: cluster of each token, int32, contiguous; no cluster is empty.
        num_clusters: K.
        epsilon: relative rounding error of a number.
        shift_B: squared length of the mean that was subtracted from the tokens, which left a rounding error of its own.
        max_iterations: maximum number of iterations.
    """
    batch, num_tokens, _ = gram_BNN.shape
    device = gram_BNN.device
    blocks, groups = triton.cdiv(num_tokens, _COLUMNS), triton.cdiv(num_clusters, _CLUSTERS)
    sums_BKN = gram_BNN.new_empty(batch, num_clusters, num_tokens)
    partial_BJK = gram_BNN.new_empty(batch, blocks, num_clusters)
    distances_BN = gram_BNN.new_empty(batch, num_tokens)
    # Cluster sizes before each iteration, and whether a token moved in it. They are integers, so atomic additions are
    # exact.
    counts = torch.zeros((max_iterations + 1) * (batch * num_clusters + 1), dtype=torch.int32, device=device)
    sizes_IBK, moved_I = counts[: -max_iterations - 1].view(-1, batch, num_clusters), counts[-max_iterations - 1 :]
    current_BN, updated_BN = assignment_BN, torch.empty_like(assignment_BN)
    _count[(batch,)](current_BN, sizes_IBK, num_tokens, num_clusters, TOKENS=triton.next_power_of_2(num_tokens))

    def add_up() -> None:
        _sum[(blocks, groups, batch)](
            gram_BNN, current_BN, sums_BKN, partial_BJK, num_tokens, num_clusters,
            COLUMNS=_COLUMNS, ROWS=_ROWS, CLUSTERS=_CLUSTERS,
        )  # fmt: skip

    iterations = 0
    while iterations < max_iterations:
        new_sizes_BK = sizes_IBK[iterations + 1]
        add_up()
        _assign[(blocks, batch)](
            gram_BNN, sums_BKN, partial_BJK, sizes_IBK[iterations], current_BN, shift_B, updated_BN, distances_BN,
            new_sizes_BK, epsilon, num_tokens, num_clusters, blocks, COLUMNS=_COLUMNS, CLUSTERS=_CLUSTERS,
        )  # fmt: skip
        _fill[(batch,)](
            current_BN, updated_BN, distances_BN, new_sizes_BK, moved_I[iterations:], num_tokens, num_clusters,
            TOKENS=triton.next_power_of_2(num_tokens), CLUSTERS=triton.next_power_of_2(num_clusters),
        )  # fmt: skip
        current_BN, updated_BN = updated_BN, current_BN
        iterations += 1
        if iterations % _CHECK_EVERY == 0 and not moved_I[iterations - 1].item():
            break
    add_up()
    sizes_BK = sizes_IBK[iterations]
    return Lloyd(current_BN, sizes_BK, (partial_BJK.sum(dim=1) / sizes_BK).sum(dim=1), iterations)


@triton.jit  # type: ignore[untyped-decorator]
def _seed(  # type: ignore[no-untyped-def]
    gram, draws, assignment, first, num_tokens, num_clusters, candidates, TOKENS: tl.constexpr, CANDIDATES: tl.constexpr
):
    image = tl.program_id(0)
    gram += image.to(tl.int64) * num_tokens * num_tokens
    token = tl.arange(0, TOKENS)
    candidate = tl.arange(0, CANDIDATES)
    inside = token < num_tokens
    norms = tl.load(gram + token * (num_tokens + 1), mask=inside, other=0.0)
    products = tl.load(gram + first * num_tokens + token, mask=inside, other=0.0)
    closest = tl.where(inside, tl.maximum(norms + tl.load(gram + first * (num_tokens + 1)) - 2 * products, 0.0), 0.0)
    nearest = tl.zeros([TOKENS], dtype=tl.int32)
    free = inside & (token != first)
    for step in range(1, num_clusters):
        cumulated = tl.cumsum(closest, 0)
        total = tl.max(cumulated, 0)
        if total > 0:
            draw = tl.load(draws + step * candidates + candidate, mask=candidate < candidates, other=0.0)
            before = (cumulated[None, :] <= (draw * total)[:, None]) & inside[None, :]
            chosen = tl.minimum(tl.sum(before.to(tl.int32), 1), num_tokens - 1)
            rows = tl.load(gram + chosen[:, None] * num_tokens + token[None, :], mask=inside[None, :], other=0.0)
            own = tl.load(gram + chosen * (num_tokens + 1))
            after = tl.minimum(tl.maximum(norms[None, :] + own[:, None] - 2 * rows, 0.0), closest[None, :])
            best = tl.argmin(tl.where(candidate < candidates, tl.sum(after, 1), float("inf")), 0)
            nearer = tl.sum(tl.where((candidate == best)[:, None], after, 0.0), 0)
            seed = tl.sum(tl.where(candidate == best, chosen, 0), 0)
            # Rounding of the sum may have drawn a token that is a seed already.
            is_free = tl.max(tl.where(free & (token == seed), 1, 0), 0)
            seed = tl.where(is_free == 1, seed, tl.min(tl.where(free, token, TOKENS), 0))
            nearest = tl.where(nearer < closest, step, nearest)
            closest = nearer
        else:
            seed = tl.min(tl.where(free, token, TOKENS), 0)
        nearest = tl.where(token == seed, step, nearest)
        free = free & (token != seed)
    tl.store(assignment + image * num_tokens + token, nearest, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _count(assignment, sizes, num_tokens, num_clusters, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    image = tl.program_id(0)
    token = tl.arange(0, TOKENS)
    inside = token < num_tokens
    own = tl.load(assignment + image * num_tokens + token, mask=inside, other=0)
    tl.atomic_add(sizes + image * num_clusters + own, 1, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sum(  # type: ignore[no-untyped-def]
    gram,
    assignment,
    sums,
    partial,
    num_tokens,
    num_clusters,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CLUSTERS: tl.constexpr,
):
    block, image = tl.program_id(0), tl.program_id(2)
    cluster = tl.program_id(1) * CLUSTERS + tl.arange(0, CLUSTERS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    gram += image.to(tl.int64) * num_tokens * num_tokens
    assignment += image * num_tokens
    total = tl.zeros([CLUSTERS, COLUMNS], dtype=tl.float32)
    for start in range(0, num_tokens, ROWS):
        row = start + tl.arange(0, ROWS)
        of_row = tl.load(assignment + row, mask=row < num_tokens, other=-1)
        products = tl.load(
            gram + row[:, None] * num_tokens + column[None, :],
            mask=(row < num_tokens)[:, None] & (column < num_tokens)[None, :],
            other=0.0,
        )
        # Full float32 products (no TF32): the decision between two clusters is a small difference of large sums.
        total = tl.dot((cluster[:, None] == of_row[None, :]).to(tl.float32), products, total, input_precision="ieee")
    of_column = tl.load(assignment + column, mask=column < num_tokens, other=-1)
    # Inner product of each token with the sum of its cluster. Summed by cluster, this is the squared norm of that sum.
    own = tl.sum(tl.where(cluster[:, None] == of_column[None, :], total, 0.0), 1)
    inside = (cluster < num_clusters)[:, None] & (column < num_tokens)[None, :]
    tl.store(sums + (image * num_clusters + cluster[:, None]) * num_tokens + column[None, :], total, mask=inside)
    tl.store(partial + (image * tl.num_programs(0) + block) * num_clusters + cluster, own, mask=cluster < num_clusters)


@triton.jit  # type: ignore[untyped-decorator]
def _assign(  # type: ignore[no-untyped-def]
    gram, sums, partial, sizes, assignment, shift, updated, distances, new_sizes, epsilon,
    num_tokens, num_clusters, blocks, COLUMNS: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    block, image = tl.program_id(0), tl.program_id(1)
    token = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = token < num_tokens
    own = tl.load(assignment + image * num_tokens + token, mask=inside, other=-1)
    norm = tl.load(
        gram + image.to(tl.int64) * num_tokens * num_tokens + token * (num_tokens + 1), mask=inside, other=0.0
    )
    largest = 0
    for start in range(0, num_clusters, CLUSTERS):
        cluster = start + tl.arange(0, CLUSTERS)
        largest = tl.maximum(
            largest, tl.max(tl.load(sizes + image * num_clusters + cluster, mask=cluster < num_clusters, other=0), 0)
        )
    # A token at equal distance (up to rounding) from two centroids would otherwise move back and forth forever.
    advantage = epsilon * (norm + epsilon * tl.load(shift + image)) * largest.to(tl.float32)  # type: ignore[attr-defined]
    least = tl.full([COLUMNS], float("inf"), dtype=tl.float32)
    nearest = tl.zeros([COLUMNS], dtype=tl.int32)
    for start in range(0, num_clusters, CLUSTERS):
        cluster = start + tl.arange(0, CLUSTERS)
        real = cluster < num_clusters
        count = tl.load(sizes + image * num_clusters + cluster, mask=real, other=1).to(tl.float32)
        norms = tl.zeros([CLUSTERS], dtype=tl.float32)
        for each in range(blocks):
            norms += tl.load(partial + (image * blocks + each) * num_clusters + cluster, mask=real, other=0.0)
        total = tl.load(
            sums + (image * num_clusters + cluster[:, None]) * num_tokens + token[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        scores = total * (-2.0 / count)[:, None] + (norms / (count * count))[:, None]
        scores = tl.where(cluster[:, None] == own[None, :], scores - advantage[None, :], scores)
        scores = tl.where(real[:, None], scores, float("inf"))
        score = tl.min(scores, 0)
        nearest = tl.where(score < least, start + tl.argmin(scores, 0), nearest)
        least = tl.minimum(score, least)
    tl.store(updated + image * num_tokens + token, nearest, mask=inside)
    tl.store(distances + image * num_tokens + token, norm + least, mask=inside)
    tl.atomic_add(new_sizes + image * num_clusters + nearest, 1, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _fill(  # type: ignore[no-untyped-def]
    assignment, updated, distances, sizes, moved, num_tokens, num_clusters, TOKENS: tl.constexpr, CLUSTERS: tl.constexpr
):
    """Gives each empty cluster the token farthest from its centroid, from clusters with more than one token.

    Also sets `moved` if a token of the image changed its cluster.
    """
    image = tl.program_id(0)
    token = tl.arange(0, TOKENS)
    cluster = tl.arange(0, CLUSTERS)
    inside = token < num_tokens
    old = tl.load(assignment + image * num_tokens + token, mask=inside, other=-1)
    new = tl.load(updated + image * num_tokens + token, mask=inside, other=-1)
    size = tl.load(sizes + image * num_clusters + cluster, mask=cluster < num_clusters, other=1)
    if tl.min(size, 0) == 0:
        distance = tl.load(distances + image * num_tokens + token, mask=inside, other=0.0)
        may_leave = inside
        for each in range(num_clusters):
            members = new == each
            # The nearest token stays; among equally near ones, the last.
            at_least = members & (distance == tl.min(tl.where(members, distance, float("inf")), 0))
            may_leave = may_leave & (token != tl.max(tl.where(at_least, token, -1), 0))
        for each in range(num_clusters):
            if tl.sum(tl.where(cluster == each, size, 0), 0) == 0:
                farthest = tl.argmax(tl.where(may_leave, distance, float("-inf")), 0)
                giver = tl.sum(tl.where(token == farthest, new, 0), 0)
                new = tl.where(token == farthest, each, new)
                may_leave = may_leave & (token != farthest)
                size = size + (cluster == each).to(tl.int32) - (cluster == giver).to(tl.int32)
        tl.store(updated + image * num_tokens + token, new, mask=inside)
        tl.store(sizes + image * num_clusters + cluster, size, mask=cluster < num_clusters)
    tl.atomic_max(moved, tl.max((old != new).to(tl.int32), 0))
