"""Reducers compared with slow references that follow their definitions, and properties of all reducers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.errors import NotFiniteError, UnsupportedBudgetError
from parcelray.models.token_reduction.average_pooling import AveragePooling
from parcelray.models.token_reduction.base import DROPPED, TokenReducer
from parcelray.models.token_reduction.cluster_aggregate import ClusterAggregate
from parcelray.models.token_reduction.divprune import DivPrune
from parcelray.models.token_reduction.saliency import Saliency
from parcelray.models.token_reduction.sampling import RandomSampling, SpatialSampling, even_positions

REDUCERS: list[TokenReducer] = [
    ClusterAggregate(),
    ClusterAggregate(metric="cosine"),
    ClusterAggregate(order="random"),
    ClusterAggregate(weighting="norm", seeding="plain"),
    RandomSampling(seed=3),
    SpatialSampling(),
    AveragePooling(),
    DivPrune(),
    Saliency(definition="norm", window=3),
]
EACH = pytest.mark.parametrize("reducer", REDUCERS, ids=repr)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(3, 64, 12, generator=torch.Generator().manual_seed(0)) + 1


@EACH
@pytest.mark.parametrize("budget", [1, 4, 9, 25, 64])
def test_every_reduction_is_consistent(reducer: TokenReducer, tokens: Tensor, budget: int) -> None:
    result = reducer(tokens, num_visual_tokens=budget)
    assert result.tokens_BKD.shape == (3, budget, 12)
    assert result.position_ids_BK.shape == result.sizes_BK.shape == (3, budget)
    for image in range(3):
        members = [(result.assignment_BN[image] == token).nonzero().flatten().tolist() for token in range(budget)]
        assert [len(each) for each in members] == result.sizes_BK[image].tolist()
        assert all(patch in each for patch, each in zip(result.position_ids_BK[image].tolist(), members, strict=True))
        kept = int((result.assignment_BN[image] != DROPPED).sum())
        assert kept == int(result.sizes_BK[image].sum())
        if getattr(reducer, "order", "position") == "position":
            positions = result.position_ids_BK[image].tolist()
            assert positions == sorted(positions)


@EACH
def test_at_the_full_budget_nothing_changes(reducer: TokenReducer, tokens: Tensor) -> None:
    result = reducer(tokens, num_visual_tokens=64)
    assert torch.equal(result.tokens_BKD, tokens)
    assert result.position_ids_BK[0].tolist() == list(range(64))


@EACH
def test_an_image_is_reduced_the_same_alone_and_in_a_batch(reducer: TokenReducer, tokens: Tensor) -> None:
    together = reducer(tokens, num_visual_tokens=16)
    alone = reducer(tokens[1:2], num_visual_tokens=16)
    assert torch.equal(together.assignment_BN[1:2], alone.assignment_BN)
    assert torch.allclose(together.tokens_BKD[1:2], alone.tokens_BKD, atol=1e-6)


@EACH
def test_half_precision_stays_half_precision(reducer: TokenReducer, tokens: Tensor) -> None:
    result = reducer(tokens.bfloat16(), num_visual_tokens=16)
    assert result.tokens_BKD.dtype == torch.bfloat16
    assert bool(result.tokens_BKD.isfinite().all())


@EACH
def test_equal_tokens_are_reduced_to_equal_tokens(reducer: TokenReducer) -> None:
    result = reducer(torch.ones(2, 64, 4), num_visual_tokens=16)
    assert torch.allclose(result.tokens_BKD, torch.ones(2, 16, 4))


@EACH
def test_illegal_budgets_and_values_are_refused(reducer: TokenReducer, tokens: Tensor) -> None:
    for budget in (0, 65):
        with pytest.raises(UnsupportedBudgetError, match=f"does not support {budget} visual tokens"):
            reducer(tokens, num_visual_tokens=budget)
    tokens[0, 0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="not finite"):
        reducer(tokens, num_visual_tokens=16)


def test_aggregates_are_the_means_of_their_members(tokens: Tensor) -> None:
    result = ClusterAggregate()(tokens, num_visual_tokens=10)
    for image in range(3):
        for cluster in range(10):
            members = tokens[image][result.assignment_BN[image] == cluster]
            assert result.tokens_BKD[image, cluster].tolist() == pytest.approx(
                members.mean(0).tolist(), rel=1e-4, abs=1e-5
            )
    weighted = ClusterAggregate(weighting="norm")(tokens, num_visual_tokens=10)
    members = tokens[0][weighted.assignment_BN[0] == 2]
    lengths = members.norm(dim=1, keepdim=True)
    assert weighted.tokens_BKD[0, 2].tolist() == pytest.approx(
        ((members * lengths).sum(0) / lengths.sum()).tolist(), rel=1e-4
    )


def test_an_aggregate_has_the_position_of_its_central_member() -> None:
    """A blob of rows 10 to 13 and columns 5 to 8 in an empty image gets the first of its four central patches."""
    picture = torch.zeros(1, 24, 24, 3)
    picture[:, 10:14, 5:9] = torch.tensor([9.0, 0.0, 0.0])
    result = ClusterAggregate()(picture.flatten(1, 2), num_visual_tokens=2)
    blob = int(result.assignment_BN[0, 10 * 24 + 5])
    assert divmod(int(result.position_ids_BK[0, blob]), 24) == (11, 6)


@pytest.mark.parametrize("budget", [1, 7, 30])
def test_positions_are_those_of_the_members_nearest_to_the_mean(tokens: Tensor, budget: int) -> None:
    result = ClusterAggregate(order="random")(tokens, num_visual_tokens=budget)
    for image in range(3):
        for cluster in range(budget):
            members = [divmod(patch, 8) for patch in range(64) if int(result.assignment_BN[image, patch]) == cluster]
            row, column = (Fraction(sum(member[axis] for member in members), len(members)) for axis in (0, 1))
            nearest = min(members, key=lambda member: ((member[0] - row) ** 2 + (member[1] - column) ** 2, member))
            assert divmod(int(result.position_ids_BK[image, cluster]), 8) == nearest


def test_cosine_ignores_lengths(tokens: Tensor) -> None:
    stretched = tokens * torch.linspace(0.5, 3, 64)[None, :, None]
    cosine = ClusterAggregate(metric="cosine")
    assert torch.equal(
        cosine(tokens, num_visual_tokens=9).assignment_BN, cosine(stretched, num_visual_tokens=9).assignment_BN
    )
    assert not torch.equal(
        ClusterAggregate()(tokens, num_visual_tokens=9).assignment_BN,
        ClusterAggregate()(stretched, num_visual_tokens=9).assignment_BN,
    )


def test_random_order_keeps_the_same_tokens(tokens: Tensor) -> None:
    by_position, drawn = (
        ClusterAggregate()(tokens, num_visual_tokens=12),
        ClusterAggregate(order="random")(tokens, num_visual_tokens=12),
    )
    assert not torch.equal(by_position.tokens_BKD, drawn.tokens_BKD)
    for image in range(3):
        assert sorted(map(tuple, by_position.tokens_BKD[image].tolist())) == sorted(
            map(tuple, drawn.tokens_BKD[image].tolist())
        )


def test_random_positions_depend_on_the_seed(tokens: Tensor) -> None:
    first, again, other = (
        RandomSampling(seed=seed)(tokens, num_visual_tokens=20).position_ids_BK for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_positions_are_uniform(tokens: Tensor) -> None:
    counts = np.zeros(64)
    for seed in range(400):
        counts[RandomSampling(seed=seed)(tokens[:1], num_visual_tokens=16).position_ids_BK[0].numpy()] += 1
    # Each position is drawn with probability 1/4: 100 +- 8.7 of 400.
    assert abs(counts - 100).max() < 4.5 * 8.7


@pytest.mark.parametrize(
    ("side", "count"), [(8, 16), (24, 64), (24, 128), (24, 29), (16, 13), (4, 15), (8, 63), (3, 1)]
)
def test_even_positions_are_spread(side: int, count: int) -> None:
    positions = even_positions(side, count)
    assert len(set(positions)) == count
    assert positions == sorted(positions)
    sides = [(patch // side < side / 2, patch % side < side / 2) for patch in positions]
    quarters = [sides.count((top, left)) for top in (True, False) for left in (True, False)]
    # A middle row or column belongs to one side.
    assert max(quarters) - min(quarters) <= count**0.5 + 1


def test_four_even_positions_are_the_centres_of_the_quarters() -> None:
    assert even_positions(8, 4) == [2 * 8 + 2, 2 * 8 + 6, 6 * 8 + 2, 6 * 8 + 6]


def test_pooling_equals_torch_for_even_cells(tokens: Tensor) -> None:
    result = AveragePooling()(tokens, num_visual_tokens=16)
    expected = F.avg_pool2d(tokens.transpose(1, 2).reshape(3, 12, 8, 8), 2).flatten(2).transpose(1, 2)
    assert torch.allclose(result.tokens_BKD, expected, atol=1e-6)
    assert AveragePooling().supported_budgets(64) == (1, 4, 9, 16, 25, 36, 49, 64)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 8, 20])
@pytest.mark.parametrize("budget", [1, 5, 16, 39, 63])
def test_windows_give_their_best_tokens_in_rounds(tokens: Tensor, window: int, budget: int) -> None:
    result = Saliency(definition="norm", window=window)(tokens, num_visual_tokens=budget)
    for image in range(3):
        scores = tokens[image].norm(dim=1).tolist()
        windows: dict[tuple[int, int], list[int]] = {}
        for patch in sorted(range(64), key=lambda patch: -scores[patch]):
            windows.setdefault((patch // 8 // window, patch % 8 // window), []).append(patch)
        kept: list[int] = []
        while len(kept) < budget:
            turn = sorted((members.pop(0) for members in windows.values() if members), key=lambda patch: -scores[patch])
            kept += turn[: budget - len(kept)]
        assert result.position_ids_BK[image].tolist() == sorted(kept)


@pytest.mark.parametrize("cells", [1, 3, 5, 7])
def test_uneven_cells_are_means_of_their_patches(tokens: Tensor, cells: int) -> None:
    result = AveragePooling()(tokens, num_visual_tokens=cells * cells)
    for number in range(cells * cells):
        # A patch belongs to the cell that contains its upper left corner.
        members = [
            patch for patch in range(64) if (patch // 8 * cells // 8, patch % 8 * cells // 8) == divmod(number, cells)
        ]
        assert torch.allclose(result.tokens_BKD[:, number], tokens[:, members].mean(1), atol=1e-5)
        assert result.assignment_BN[0, members].tolist() == [number] * len(members)
        assert int(result.position_ids_BK[0, number]) in members


def test_samples_are_the_tokens_at_their_positions(tokens: Tensor) -> None:
    drawn = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:9].sort().values.tolist()
    # The centres of thirds of 8 rows and columns: 1.33, 4 and 6.67.
    even = [row * 8 + column for row in (1, 4, 6) for column in (1, 4, 6)]
    for reducer, positions in ((RandomSampling(seed=3), drawn), (SpatialSampling(), even)):
        result = reducer(tokens, num_visual_tokens=9)
        assert result.position_ids_BK.tolist() == [positions] * 3
        assert torch.equal(result.tokens_BKD, tokens[:, positions])


def _divprune(tokens: np.ndarray, count: int) -> list[int]:
    """Selects tokens by the definition of DivPrune, pair by pair."""
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    distance = [[1 - float(a @ b) for b in unit] for a in unit]
    everyone = range(len(unit))
    kept = [max(everyone, key=lambda token: min(distance[token][other] for other in everyone if other != token))]
    while len(kept) < count:
        rest = [token for token in everyone if token not in kept]
        kept.append(max(rest, key=lambda token: min(distance[token][other] for other in kept)))
    return sorted(kept)


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_divprune_matches_its_definition(tokens: Tensor, count: int) -> None:
    result = DivPrune()(tokens, num_visual_tokens=count)
    for image in range(3):
        assert result.position_ids_BK[image].tolist() == _divprune(tokens[image].numpy().astype(np.float64), count)
