"""`parcelray bench tune` runs, and both of its comparisons are of searches that end."""

import pytest

from parcelray.cluster import tune_bench

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_points_and_trials_are_measured(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two points and three trainings; those on Ray Train's workers are the same search with other workers.
    monkeypatch.setattr(tune_bench, "_GRIDS", (0, 1))
    monkeypatch.setattr(tune_bench, "_BUDGETS", ([16],))
    monkeypatch.setattr(tune_bench, "_MANY", 2)
    monkeypatch.setattr(tune_bench, "_WORKERS", {"in its own process": 0})
    said: list[str] = []
    report = tune_bench.bench_tuning(samples=1, steps=2, repeats=1, say=said.append)
    found = {measure.name: measure for measure in report.measures}
    warm, cold = found["split search, warm"].value, found["split search, a process per point"].value
    assert warm > 0
    assert cold > 0
    assert found["warm over a process per point"].value == pytest.approx(warm / cold)
    assert found["warm over a process per point"].goal == ">= 3"
    assert found["bare training, 2 steps"].value > 0
    assert "training trial in its own process minus bare training" in found
    assert said[0] == "round 1 of 1: split search, warm"
