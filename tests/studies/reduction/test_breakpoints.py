"""Breakpoints of methods, on known scores."""

import numpy as np
import pytest

from parcelray.evaluation.scoring.estimate import Estimate
from parcelray.studies.reduction.breakpoints import Breakpoint, breakpoint_of, family_breakpoints, kind_of, kinds_kept

from .known_scores import samples, summary


def _kept(**values: tuple[float, float]) -> dict[int, Estimate]:
    """Returns retention estimates by budget, from values and standard errors in percent."""
    return {
        int(budget[1:]): Estimate(value, value + error * np.random.default_rng(0).normal(size=4000), 100)
        for budget, (value, error) in values.items()
    }


def test_certain_budgets_follow_from_the_ends_of_the_intervals() -> None:
    result = breakpoint_of("cluster", "text", _kept(b8=(60, 5), b16=(85, 5), b32=(93, 5), b64=(99, 1)))
    # The intervals are two standard errors wide. 60 +- 10 is surely below 90, 85 +- 10 is not. 93 is above 90, but only
    # 99 +- 2 is surely above.
    assert result == Breakpoint("cluster", "text", budget=32, surely_kept=64, surely_broken=8)


def test_a_budget_counts_only_if_all_larger_budgets_are_kept() -> None:
    assert breakpoint_of("a", "b", _kept(b8=(95, 0.1), b16=(80, 0.1), b32=(95, 0.1))) == Breakpoint(
        "a", "b", 32, 32, None
    )
    assert breakpoint_of("a", "b", _kept(b8=(50, 0.1), b16=(60, 0.1))) == Breakpoint("a", "b", None, None, 16)


def test_the_breakpoint_of_random_sampling_is_that_of_the_mean_over_seeds() -> None:
    questions = samples(["count"] * 100)
    full = summary(questions, {64: [True] * 100})
    # One seed has a retention of 100 % at 8 tokens; the mean over both seeds is 80 %.
    seeds = [
        summary(questions, {8: [True] * 100, 16: [True] * 100}),
        summary(questions, {8: [True] * 60 + [False] * 40, 16: [True] * 100}),
    ]
    assert family_breakpoints("random", seeds, full, 64) == [Breakpoint("random", "general", 16, 16, 8)]


def test_the_kind_of_a_question_follows_from_its_task_or_benchmark() -> None:
    questions = samples(["word", "form", "relation", "bar_height", "count"])
    assert [kind_of(sample) for sample in questions] == ["text", "documents", "spatial", "charts", ""]
    assert kind_of(samples(["vqa"], benchmark="docvqa_val")[0]) == "documents"


def test_retention_is_measured_separately_for_each_kind() -> None:
    questions = samples(["word"] * 50 + ["relation"] * 50)
    full = summary(questions, {64: [True] * 40 + [False] * 10 + [True] * 50})
    method = summary(questions, {8: [True] * 10 + [False] * 40 + [True] * 50})
    kept = kinds_kept({"method": [method]}, full, 64)
    assert set(kept) == {("method", "text"), ("method", "spatial")}
    assert kept["method", "text"][8].value == pytest.approx(25)
    interval = kept["method", "text"][8].interval
    # 10 of the 40 samples that the full model answers correctly: Wilson's interval of that proportion is 14 to 40 %.
    assert interval.low == pytest.approx(14, abs=3)
    assert interval.high == pytest.approx(40, abs=3)
    # Both are right on all 50 samples; that does not prove that they would be on others.
    whole = kept["method", "spatial"][8].interval
    assert 90 < whole.low < whole.value == 100 < whole.high < 110
