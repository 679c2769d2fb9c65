"""K-means on the Gram matrix, compared with the definition in the papers and with scikit-learn."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from parcelray.errors import NotFiniteError, UserError
from parcelray.models.token_reduction.kmeans import _with_every_cluster, cluster_sums, kmeans


def _tokens(batch: int = 3, count: int = 48, width: int = 7, seed: int = 0) -> Tensor:
    """Returns blobs of different sizes, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(batch, 6, width, generator=generator)
    owner = torch.randint(6, (batch, count), generator=generator) * torch.randint(
        2, (batch, count), generator=generator
    )
    return (
        20
        + centres.gather(1, owner[:, :, None].expand(-1, -1, width))
        + torch.randn(batch, count, width, generator=generator)
    )


def _reference(tokens: np.ndarray, num_clusters: int, seed: int, candidates: int) -> tuple[np.ndarray, float]:
    """Clusters one image in float64: seeding with the same draws, then Lloyd, step by step as defined."""
    generator = torch.Generator().manual_seed(seed)
    seeds = [int(torch.randint(len(tokens), (), generator=generator))]
    draws = torch.rand(num_clusters, candidates, generator=generator).numpy().astype(np.float64)
    for step in range(1, num_clusters):
        closest = np.min([((tokens - tokens[each]) ** 2).sum(1) for each in seeds], axis=0)
        options = [int(np.searchsorted(np.cumsum(closest), draw * closest.sum(), side="right")) for draw in draws[step]]
        potentials = [np.minimum(closest, ((tokens - tokens[option]) ** 2).sum(1)).sum() for option in options]
        seeds.append(options[int(np.argmin(potentials))])
    centroids = tokens[seeds]
    labels = None
    while True:
        distances = ((tokens[:, None] - centroids[None]) ** 2).sum(2)
        result = distances.argmin(1)
        if labels is not None and (result == labels).all():
            return labels, float(distances.min(1).sum())
        labels = result
        centroids = np.array([tokens[labels == cluster].mean(0) for cluster in range(num_clusters)])


@pytest.mark.parametrize(("seeding", "candidates"), [("greedy", 4), ("plain", 1)])
@pytest.mark.parametrize("num_clusters", [2, 5, 11])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_clusters_match_the_definition(seeding: str, candidates: int, num_clusters: int, seed: int) -> None:
    tokens = _tokens()
    result = kmeans(tokens, num_clusters, seed=seed, seeding=seeding, candidates=candidates)  # type: ignore[arg-type]
    for image in range(len(tokens)):
        labels, inertia = _reference(tokens[image].numpy().astype(np.float64), num_clusters, seed, candidates)
        assert result.assignment_BN[image].tolist() == labels.tolist()
        assert float(result.inertia_B[image]) == pytest.approx(inertia, rel=1e-4)
        assert result.sizes_BK[image].tolist() == np.bincount(labels, minlength=num_clusters).tolist()


def test_the_inertia_matches_scikit_learn() -> None:
    tokens = _tokens(batch=2, count=200, width=32)
    ours = np.mean([kmeans(tokens, 12, seed=seed).inertia_B.numpy() for seed in range(10)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = np.mean(
            [
                KMeans(12, n_init=1, random_state=seed).fit(image.numpy()).inertia_
                for seed in range(10)
                for image in tokens
            ]
        )
    assert ours == pytest.approx(theirs, rel=0.02)


def test_an_image_has_the_same_clusters_alone_and_in_a_batch() -> None:
    tokens = _tokens(batch=4)
    together = kmeans(tokens, 7, seed=3)
    for image in range(4):
        alone = kmeans(tokens[image : image + 1], 7, seed=3)
        assert torch.equal(alone.assignment_BN[0], together.assignment_BN[image])


def test_the_clusters_depend_on_the_seed() -> None:
    tokens = _tokens()
    assert torch.equal(kmeans(tokens, 9, seed=1).assignment_BN, kmeans(tokens, 9, seed=1).assignment_BN)
    assert not torch.equal(kmeans(tokens, 9, seed=1).assignment_BN, kmeans(tokens, 9, seed=2).assignment_BN)


def test_more_iterations_are_never_worse() -> None:
    inertias = [float(kmeans(_tokens(), 8, max_iterations=limit).inertia_B.sum()) for limit in (0, 1, 2, 50)]
    assert inertias == sorted(inertias, reverse=True)
    assert kmeans(_tokens(), 8, max_iterations=50).iterations < 50


def test_as_many_clusters_as_tokens() -> None:
    result = kmeans(_tokens(), 48)
    assert (result.sizes_BK == 1).all()
    assert float(result.inertia_B.max()) == pytest.approx(0, abs=1e-2)


def test_one_cluster_is_the_mean() -> None:
    tokens = _tokens()
    result = kmeans(tokens, 1)
    assert (result.assignment_BN == 0).all()
    spread = ((tokens - tokens.mean(1, keepdim=True)) ** 2).sum((1, 2))
    assert result.inertia_B.tolist() == pytest.approx(spread.tolist(), rel=1e-4)


@pytest.mark.parametrize("different", [1, 2, 5])
def test_equal_tokens_leave_no_cluster_empty(different: int) -> None:
    values = torch.randn(1, different, 4, generator=torch.Generator().manual_seed(0))
    tokens = values[:, torch.arange(20) % different].expand(3, -1, -1)
    result = kmeans(tokens, 8)
    assert int(result.sizes_BK.min()) >= 1
    assert result.sizes_BK.sum(1).tolist() == [20, 20, 20]
    assert float(result.inertia_B.max()) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("different", [2, 5, 40])
@pytest.mark.parametrize("shift", [0, 50])
def test_equal_tokens_converge(different: int, shift: int) -> None:
    """With equal tokens, several centroids are equal; rounding must not move tokens back and forth between them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, different, 64, generator=generator) + shift
    tokens = values[:, torch.randint(different, (576,), generator=generator)]
    result = kmeans(tokens, 64)
    assert result.iterations < 5
    assert int(result.sizes_BK.min()) >= 1


def test_empty_clusters_get_the_farthest_tokens_of_larger_clusters() -> None:
    generator = torch.Generator().manual_seed(1)
    assignment = torch.randint(6, (4, 30), generator=generator) * torch.randint(3, (4, 30), generator=generator)
    # Includes equal distances, for which the first token moves.
    distances = torch.randint(8, (4, 30), generator=generator).float()
    sizes = torch.stack([torch.bincount(each, minlength=16) for each in assignment])
    result = _with_every_cluster(assignment, distances, sizes)
    for image in range(4):
        expected, left = assignment[image].tolist(), sizes[image].tolist()
        for cluster in [number for number in range(16) if left[number] == 0]:
            spare = [token for token in range(30) if left[expected[token]] > 1]
            token = max(spare, key=lambda each: float(distances[image, each]))
            left[expected[token]] -= 1
            left[cluster] = 1
            expected[token] = cluster
        assert result[image].tolist() == expected


@pytest.mark.gpu
def test_gpu_clusters_match_the_cpu_with_few_synchronisations() -> None:
    tokens = _tokens(batch=4, count=200, width=32)
    expected, result = kmeans(tokens, 12), kmeans(tokens.cuda(), 12)
    assert result.inertia_B.tolist() == pytest.approx(expected.inertia_B.tolist(), rel=1e-3)
    equal = tokens[:, torch.arange(200) % 9]
    assert int(kmeans(equal.cuda(), 12).sizes_BK.min()) >= 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        kmeans(tokens.cuda(), 12)
    waits = sum(event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense")
    # One check for finite values, and one check for convergence every fourth iteration.
    assert waits <= 1 + -(-result.iterations // 4)


def test_tokens_that_require_gradients_are_clustered_like_others() -> None:
    tokens = _tokens()
    with torch.inference_mode():
        expected = kmeans(tokens, 6)
    result = kmeans(tokens.clone().requires_grad_(), 6)
    assert result.assignment_BN.tolist() == expected.assignment_BN.tolist()
    assert not result.inertia_B.requires_grad


@pytest.mark.parametrize("num_clusters", [0, 49, -1])
def test_impossible_counts_are_refused(num_clusters: int) -> None:
    with pytest.raises(UserError, match=f"48 tokens cannot form {num_clusters} clusters; choose 1 to 48"):
        kmeans(_tokens(), num_clusters)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tokens_that_are_not_finite_are_refused(value: float) -> None:
    tokens = _tokens()
    tokens[1, 5, 2] = value
    with pytest.raises(NotFiniteError, match="not finite"):
        kmeans(tokens, 4)


def test_sums_are_by_cluster() -> None:
    tokens = _tokens()
    result = kmeans(tokens, 5)
    sums = cluster_sums(tokens, result.assignment_BN, 5)
    for image in range(3):
        for cluster in range(5):
            expected = tokens[image][result.assignment_BN[image] == cluster].sum(0)
            assert sums[image, cluster].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
