"""The proposed points depend only on the seed and the record, so a resumed search continues unchanged."""

import math
from pathlib import Path
from typing import Any

import pytest

from parcelray.config.objectives import Objective
from parcelray.config.search_space import Assignment, SearchSpace
from parcelray.config.tune import GridAlgorithm, OptunaAlgorithm, PbtAlgorithm, RandomAlgorithm, SearchAlgorithm
from parcelray.tuning.planner import Planner, importance, make_planner
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord, point_key

SPACE = SearchSpace.model_validate(
    {
        "kind": "search_space",
        "name": "s",
        "job": "j.yaml",
        "parameters": {
            "kind": {"type": "choice", "values": ["plain", "curved"]},
            "x": {"type": "real", "low": 0.0, "high": 1.0},
            "power": {"type": "integer", "low": 1, "high": 4, "when": {"kind": ["curved"]}},
            "rate": {"type": "real", "low": 1e-4, "high": 1.0, "log": True},
        },
    }
)
SPLITS = SearchSpace.model_validate(
    {
        "kind": "search_space",
        "name": "splits",
        "job": "j.yaml",
        "parameters": {
            "anchor_grid": {"type": "choice", "values": [0, 1, 2, 4]},
            "budgets": {"type": "choice", "values": [[4], [16]]},
        },
        "constraints": [{"type": "anchors_fit", "anchor_grid": "anchor_grid", "budget": "budgets", "patch_grid": 16}],
    }
)
ONE = [Objective(metric="y", mode="max")]
TWO = [Objective(metric="y", mode="max"), Objective(metric="cost", mode="min")]


def _measure(point: Assignment) -> dict[str, float]:
    """Measures a point; the optimum is at kind = curved, x = 0.7, rate = 0.01."""
    penalty = 0.0 if point.get("kind") == "curved" else 0.5
    y = 1 - penalty - (point["x"] - 0.7) ** 2 - 0.05 * abs(math.log10(point["rate"]) + 2)
    return {"y": y, "cost": point["x"]}


def _run(
    folder: Path,
    space: SearchSpace,
    algorithm: SearchAlgorithm,
    objectives: Any = ONE,
    *,
    stop_after: int | None = None,
    measure: Any = _measure,
) -> list[Assignment]:
    """Runs a search with three points at a time, which finish out of order, and returns the points that were run."""
    record = TrialRecord(folder)
    planner = make_planner(space, algorithm, objectives, 7, record)
    run: list[Assignment] = []
    running: list[Assignment] = []
    while True:
        point = planner.ask() if len(running) < 3 else None
        if point is not None:
            running.append(point)
            continue
        if not running:
            assert planner.is_finished
            return run
        done = running.pop((len(run) * 2) % len(running))
        trial = FinishedTrial(point_key(done), done, measure(done), 1.0)
        record.add(trial)
        planner.tell(trial)
        run.append(done)
        if stop_after is not None and len(run) >= stop_after:
            return run


@pytest.mark.parametrize(
    "algorithm",
    [RandomAlgorithm(trials=25), OptunaAlgorithm(trials=25, startup_trials=6, batch=4)],
    ids=lambda each: each.type,
)
@pytest.mark.parametrize("stop_after", [1, 9, 24])
def test_a_resumed_search_runs_the_points_of_an_uninterrupted_one(
    tmp_path: Path, algorithm: SearchAlgorithm, stop_after: int
) -> None:
    uninterrupted = _run(tmp_path / "uninterrupted", SPACE, algorithm)
    before = _run(tmp_path / "killed", SPACE, algorithm, stop_after=stop_after)
    after = _run(tmp_path / "killed", SPACE, algorithm)
    assert sorted(map(point_key, before + after)) == sorted(map(point_key, uninterrupted)), (
        "no point is lost or repeated"
    )
    assert len(uninterrupted) == 25


def test_a_grid_has_every_point_once_and_skips_recorded_points(tmp_path: Path) -> None:
    measure = lambda point: {"y": 0.0}  # noqa: E731
    before = _run(tmp_path, SPLITS, GridAlgorithm(), stop_after=2, measure=measure)
    after = _run(tmp_path, SPLITS, GridAlgorithm(), measure=measure)
    points = before + after
    assert len({point_key(point) for point in points}) == len(points) == SPLITS.size == 7
    assert all(SPLITS.allows(point) for point in points)


def test_tpe_finds_good_points_sooner_than_random_search(tmp_path: Path) -> None:
    best = {}
    for algorithm in (RandomAlgorithm(trials=50), OptunaAlgorithm(trials=50, startup_trials=12, batch=4)):
        points = _run(tmp_path / algorithm.type, SPACE, algorithm)
        late = [_measure(point)["y"] for point in points[25:]]
        best[algorithm.type] = sum(late) / len(late)
    assert best["optuna"] > best["random"] + 0.15


def test_tpe_respects_conditions_constraints_and_the_size_of_a_small_space(tmp_path: Path) -> None:
    points = _run(tmp_path / "conditions", SPACE, OptunaAlgorithm(trials=30, startup_trials=5), TWO)
    assert all(("power" in point) == (point["kind"] == "curved") for point in points)
    splits = _run(
        tmp_path / "splits",
        SPLITS,
        OptunaAlgorithm(trials=100, startup_trials=2),
        measure=lambda point: {"y": float(point["anchor_grid"])},
    )
    assert len(splits) == len({point_key(point) for point in splits}) == 7, (
        "all points of the space, and then the search ends"
    )


def test_a_failed_trial_neither_stops_tpe_nor_is_proposed_again(tmp_path: Path) -> None:
    record = TrialRecord(tmp_path)
    planner = make_planner(SPACE, OptunaAlgorithm(trials=12, startup_trials=4, batch=3), ONE, 0, record)
    keys = []
    while (point := planner.ask()) is not None:
        keys.append(point_key(point))
        trial = FinishedTrial(
            point_key(point),
            point,
            {} if len(keys) % 3 == 0 else _measure(point),
            1.0,
            "broke" if len(keys) % 3 == 0 else None,
        )
        record.add(trial)
        planner.tell(trial)
    assert planner.is_finished
    assert len(set(keys)) == 12


def test_importance_is_the_share_of_variance_of_each_parameter(tmp_path: Path) -> None:
    trials = [
        FinishedTrial(point_key(point), point, _measure(point), 1.0)
        for point in _run(tmp_path, SPACE, RandomAlgorithm(trials=60))
    ]
    shares = importance(SPACE, trials, ONE[0])
    assert set(shares) == {"kind", "x", "rate"}, "only parameters that are active in every trial"
    assert shares["kind"] > shares["x"]
    assert sum(shares.values()) == pytest.approx(1)
    assert importance(SPACE, trials[:3], ONE[0]) == {}


def test_a_population_is_run_again_as_a_whole_unless_all_members_are_finished(tmp_path: Path) -> None:
    def planner() -> Planner:
        return make_planner(SPACE, PbtAlgorithm(population=3, segments=2), ONE, 0, TrialRecord(tmp_path))

    first = planner()
    members = [first.ask() for _ in range(3)]
    assert first.is_finished
    assert not first.is_done, "proposed, but not trained: the search is not finished yet"
    for member in members[:2]:
        assert member is not None
        trial = FinishedTrial(point_key(member), member, _measure(member), 1.0)
        TrialRecord(tmp_path).add(trial)
        first.tell(trial)
    assert not first.is_done
    again = planner()
    assert [again.ask() for _ in range(4)] == [*members, None]
    assert members[2] is not None
    TrialRecord(tmp_path).add(FinishedTrial(point_key(members[2]), members[2], {}, 1.0))
    assert planner().is_done
