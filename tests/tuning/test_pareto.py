"""Pareto fronts, hypervolumes and knees against values calculated by hand and by inclusion-exclusion."""

import itertools

import numpy as np
import pytest

from parcelray.tuning.pareto import hypervolume, knee_point, losses, pareto_front, volume_over_time


def test_values_to_maximize_change_their_sign() -> None:
    assert losses([[80.0, 16.0], [90.0, 64.0]], ["max", "min"]).tolist() == [[-80.0, 16.0], [-90.0, 64.0]]
    assert losses([], ["max", "min"]).shape == (0, 2)


def test_the_front_has_the_points_that_are_not_dominated() -> None:
    points = np.array([[1.0, 5.0], [2.0, 3.0], [2.0, 4.0], [4.0, 1.0], [4.0, 1.0], [5.0, 5.0], [np.nan, 0.0]])
    assert pareto_front(points) == [0, 1, 3, 4]
    assert pareto_front(np.empty((0, 2))) == []


def test_hypervolume_of_two_objectives_is_the_area_of_a_staircase() -> None:
    # By hand: below (5, 5) the points (1, 4), (2, 2), (4, 1) dominate 4 + 3 * 2 + 1 unit squares.
    points = np.array([[1.0, 4.0], [2.0, 2.0], [4.0, 1.0]])
    assert hypervolume(points, np.array([5.0, 5.0])) == pytest.approx(4 * 1 + 3 * 2 + 1 * 1)
    assert hypervolume(
        np.vstack([points, [[6.0, 0.0], [2.0, 2.0], [3.0, 3.0]]]), np.array([5.0, 5.0])
    ) == pytest.approx(11)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_equals_inclusion_and_exclusion(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    points, reference = rng.uniform(0, 1, (7, objectives)), np.full(objectives, 1.2)
    expected = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            expected += (-1) ** (size + 1) * float(np.prod(reference - np.max(chosen, axis=0)))
    assert hypervolume(points, reference) == pytest.approx(expected)


def test_the_knee_is_where_the_front_bends() -> None:
    # The point (2, 2) is farthest below the line from (0, 10) to (10, 0); the point with NaN is ignored.
    points = np.array([[0.0, 10.0], [1.0, 8.5], [2.0, 2.0], [6.0, 1.5], [10.0, 0.0], [9.0, 9.0], [np.nan, 1.0]])
    assert knee_point(points) == 2
    assert knee_point(np.array([[3.0], [1.0], [2.0]])) == 1
    assert knee_point(np.empty((0, 2))) is None


def test_the_volume_over_time_never_decreases_and_ends_at_the_same_value_in_any_order() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20, 2))
    points[4] = np.nan
    box = np.full(2, -2.0), np.full(2, 2.0)
    shares = volume_over_time(points, *box)
    assert all(before <= after + 1e-12 for before, after in itertools.pairwise(shares))
    assert shares[3] == shares[4]
    assert volume_over_time(points[::-1], *box)[-1] == pytest.approx(shares[-1])
    assert 0 < shares[-1] <= 1
    assert volume_over_time(points[:7], *box) == shares[:7], "later points do not change earlier values"
    assert volume_over_time(np.array([[-9.0, 9.0]]), *box) == volume_over_time(np.array([[-2.0, 2.0]]), *box)
