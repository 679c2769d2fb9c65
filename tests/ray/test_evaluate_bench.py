"""`parcelray bench evaluate` runs, and what is shared changes no answer."""

import pytest

from parcelray.cluster import evaluate_bench

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_all_four_comparisons_are_measured(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # As few as each comparison needs: two bundles of 64, five questions to an image.
    monkeypatch.setattr(evaluate_bench, "_QUESTIONS", 6)
    monkeypatch.setattr(evaluate_bench, "_IMAGES", 5)
    monkeypatch.setattr(evaluate_bench, "_DIFFERENT", 75)
    report = evaluate_bench.bench_evaluation(samples=128, repeats=1, memory_samples=(50, 75))
    values = [(measure.name, measure.value) for measure in report.measures]
    assert [value for name, value in values if name.endswith("answers that differ")] == [0, 0, 0]
    assert all(value > 0 for name, value in values if not name.endswith("answers that differ"))
    goals = {measure.name: measure.goal for measure in report.measures if measure.goal is not None}
    assert goals["vision-heavy: one pass over 3 budgets"] == ">= 1.8"
    assert goals["ray data over plain loop"] == ">= 0.9"
    assert goals["peak memory, 75 over 50 samples"] == "<= 1.15"
