"""`parcelray bench evaluate` runs, and what is shared changes no answer."""

import pytest

from parcelray.cluster.evaluate_bench import bench_evaluation

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_all_four_comparisons_are_measured(ray_session: None) -> None:
    report = bench_evaluation(samples=256, repeats=1, memory_samples=(500, 750))
    values = [(measure.name, measure.value) for measure in report.measures]
    assert [value for name, value in values if name.endswith("answers that differ")] == [0, 0, 0]
    assert all(value > 0 for name, value in values if not name.endswith("answers that differ"))
    goals = {measure.name: measure.goal for measure in report.measures if measure.goal is not None}
    assert goals["vision-heavy: one pass over 3 budgets"] == ">= 1.8"
    assert goals["ray data over plain loop"] == ">= 0.9"
    assert goals["peak memory, 750 over 500 samples"] == "<= 1.15"
