"""Search spaces: validation, random draws and grids."""

import math
import random
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from parcelray.config.loader import ConfigError
from parcelray.config.search_space import IntegerDomain, RealDomain, SearchSpace
from parcelray.config.space_checks import check_search_space, load_search_space

ROOT = Path(__file__).resolve().parents[2]


def _space(**parameters: object) -> SearchSpace:
    return SearchSpace.model_validate(
        {"kind": "search_space", "name": "s", "job": "jobs/evaluate/training_free.yaml", "parameters": parameters}
    )


def test_a_grid_contains_each_active_assignment_once() -> None:
    space = _space(
        a={"type": "choice", "values": ["x", "y"]},
        b={"type": "integer", "low": 1, "high": 3, "when": {"a": ["x"]}},
        c={"type": "choice", "values": [True, False], "when": {"b": [2]}},
    )
    assert list(space.grid()) == [
        {"a": "x", "b": 1},
        {"a": "x", "b": 2, "c": True},
        {"a": "x", "b": 2, "c": False},
        {"a": "x", "b": 3},
        {"a": "y"},
    ]
    assert space.size == 5
    assert _space(r={"type": "real", "low": 0, "high": 1}).size is None
    with pytest.raises(ValueError, match="r is real-valued, so the space has no grid"):
        list(_space(r={"type": "real", "low": 0, "high": 1}).grid())


def test_the_size_of_a_large_space_without_conditions_is_a_product() -> None:
    # Enumerating 100^6 assignments would never finish.
    space = _space(
        **{f"p{index}": {"type": "integer", "low": 1, "high": 100} for index in range(6)},
        q={"type": "choice", "values": [1, 1, 2]},
    )
    assert space.size == 100**6 * 2
    assert space.size == 100**6 * 2


def test_draws_are_reproducible_legal_and_cover_all_values() -> None:
    space = _space(
        a={"type": "choice", "values": ["x", "y"]},
        b={"type": "integer", "low": 4, "high": 10, "step": 3, "when": {"a": ["x"]}},
        r={"type": "real", "low": 1, "high": 2},
    )
    rng = random.Random(0)
    draws = [space.sample(rng) for _ in range(300)]
    again = random.Random(0)
    assert draws == [space.sample(again) for _ in range(300)]
    assert {draw.get("b") for draw in draws} == {4, 7, 10, None}
    assert all(("b" in draw) == (draw["a"] == "x") and 1 <= draw["r"] <= 2 for draw in draws)


def test_logarithmic_draws_have_the_same_probability_in_each_order_of_magnitude() -> None:
    rng = random.Random(1)
    real, integer = RealDomain(low=1e-4, high=1, log=True), IntegerDomain(low=1, high=9999, log=True)
    magnitudes = [math.floor(math.log10(real.draw(rng))) for _ in range(4000)]
    assert all(abs(magnitudes.count(power) - 1000) < 120 for power in range(-4, 0))
    numbers = [math.floor(math.log10(integer.draw(rng))) for _ in range(4000)]
    assert all(abs(numbers.count(power) - 1000) < 120 for power in range(4))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "at least 1 item"),
        ({"a": {"type": "choice", "values": []}}, "parameters.a.values"),
        ({"a": {"type": "integer", "low": 3, "high": 2}}, "3 to 2 is not a valid range; give low <= high"),
        ({"a": {"type": "real", "low": 0, "high": 1, "log": True}}, "not a valid logarithmic range; give low > 0"),
        ({"a": {"type": "choise", "values": [1]}}, "legal: choice, integer, real"),
        (
            {"a": {"type": "integer", "low": 1, "high": 2, "when": {"b": [1]}}},
            "a depends on b, which is not an earlier parameter",
        ),
        (
            {"b": {"type": "choice", "values": [1]}, "a": {"type": "choice", "values": [1], "when": {"b": [2]}}},
            "a depends on b being 2, which is not a value of b",
        ),
    ],
)
def test_invalid_parameters_are_rejected_with_the_reason(
    parameters: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        yaml.safe_dump(
            {"kind": "search_space", "name": "s", "job": "j.yaml", "parameters": parameters}, sort_keys=False
        )
    )
    with pytest.raises(ConfigError, match=message):
        load_search_space(path)


def test_keys_and_values_that_the_job_rejects_are_named() -> None:
    for parameters, message in (
        (
            {"reducer.metrik": {"type": "choice", "values": ["cosine"]}},
            "reducer.metrik is not a known key.*did you mean metric",
        ),
        (
            {"reducer.metric": {"type": "choice", "values": ["cosine", "hamming"]}},
            "'hamming'; legal: euclidean, cosine",
        ),
        ({"reducer.max_iterations": {"type": "integer", "low": -1, "high": 2}}, "reducer.max_iterations is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_search_space(_space(**parameters), ROOT)


def test_the_cluster_count_space_is_valid_and_has_the_expected_size() -> None:
    space = load_search_space(ROOT / "search_spaces" / "cluster_count.yaml")
    check_search_space(space, ROOT)
    # Ten budgets, two metrics, two weightings, two seedings and five iteration counts; two orders with contiguous
    # positions, and one with each of the two other positions.
    assert space.size == 10 * 2 * 2 * 2 * 5 * (2 + 1 + 1)


def test_splits_with_more_anchors_than_budget_are_not_part_of_the_space() -> None:
    space = load_search_space(ROOT / "search_spaces" / "anchor_query_split.yaml")
    check_search_space(space, ROOT)
    splits = [(point["anchor_grid"], point["budgets"][0]) for point in space.grid()]
    assert len(splits) == len(set(splits)) == space.size == 14 + 14 + 14 + 12 + 8 + 1
    assert all(side * side <= budget for side, budget in splits)
    rng = random.Random(0)
    drawn = {(point["anchor_grid"], point["budgets"][0]) for point in (space.sample(rng) for _ in range(3000))}
    assert drawn == set(splits)
    with pytest.raises(ValidationError, match="constraint anchors_fit uses grid, which is not a parameter"):
        SearchSpace.model_validate(
            space.model_dump()
            | {"constraints": [{"type": "anchors_fit", "anchor_grid": "grid", "budget": "budgets", "patch_grid": 16}]}
        )
