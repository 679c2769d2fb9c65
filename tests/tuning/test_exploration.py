"""The points that population-based training explores stay inside the space, for all kinds of parameters."""

import random
from typing import Any

import pytest
from ray.tune.schedulers.pbt import _explore

from parcelray.config.search_space import Assignment, SearchSpace
from parcelray.config.tune import PbtAlgorithm
from parcelray.tuning.training_trial import explore, population_scheduler

SPACE = SearchSpace.model_validate(
    {
        "kind": "search_space",
        "name": "s",
        "job": "j.yaml",
        "parameters": {
            "type": {"type": "choice", "values": ["adamw", "sgd"]},
            "momentum": {"type": "choice", "values": [0.0, 0.9], "when": {"type": ["sgd"]}},
            "grid": {"type": "choice", "values": [0, 2, 4, 8]},
            "budgets": {"type": "choice", "values": [[8], [16], [64]]},
            "warmup": {"type": "integer", "low": 4, "high": 11, "step": 3},
            "rate": {"type": "real", "low": 1e-3, "high": 1e-2, "log": True},
        },
        "constraints": [{"type": "anchors_fit", "anchor_grid": "grid", "budget": "budgets", "patch_grid": 16}],
    }
)


def _check(point: Assignment) -> None:
    assert SPACE.allows(point)
    assert ("momentum" in point) == (point["type"] == "sgd"), "a parameter that becomes active is drawn"
    assert point["warmup"] in (4, 7, 10)
    assert 1e-3 <= point["rate"] <= 1e-2
    assert point["grid"] in (0, 2, 4, 8)


def test_every_point_of_a_long_random_walk_is_legal_and_all_values_are_reached() -> None:
    rng = random.Random(0)
    point = SPACE.sample(rng)
    walked = []
    for _ in range(600):
        point = explore(SPACE, point, rng)
        _check(point)
        walked.append(point)
    for name, legal in {"type": {"adamw", "sgd"}, "warmup": {4, 7, 10}, "grid": {0, 2, 4, 8}}.items():
        assert {each[name] for each in walked} == legal


def test_a_choice_moves_to_a_neighbour_and_a_number_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parcelray.tuning.training_trial.RESAMPLE", 0.0)
    point: dict[str, Any] = {"type": "adamw", "grid": 2, "budgets": [64], "warmup": 7, "rate": 5e-3}
    moves = [explore(SPACE, point, random.Random(seed)) for seed in range(60)]
    assert {each["grid"] for each in moves} <= {0, 4}
    assert {each["warmup"] for each in moves} == {4, 10}
    assert {round(each["rate"], 6) for each in moves} == {4e-3, 6e-3}


def test_the_scheduler_of_tune_explores_within_the_space() -> None:
    scheduler = population_scheduler(SPACE, PbtAlgorithm(population=2, segments=2), seed=1)
    config = {"assignment": SPACE.sample(random.Random(3))}
    for _ in range(50):
        config, _ = _explore(config, scheduler._hyperparam_mutations, 0.25, (1.2, 0.8), scheduler._custom_explore_fn)  # type: ignore[attr-defined, arg-type]
        _check(config["assignment"])
