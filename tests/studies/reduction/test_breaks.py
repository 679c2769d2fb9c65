"""Where a family breaks, on scores that are known."""

import numpy as np
import pytest

from parcelray.evaluation.scoring.split_scores import Estimate
from parcelray.studies.reduction.breaks import Break, break_of, family_breaks, kind_of, kinds_kept

from .known_scores import samples, summary


def _kept(**values: tuple[float, float]) -> dict[int, Estimate]:
    """Percent with its standard error, by budget."""
    return {
        int(budget[1:]): Estimate(value, value + error * np.random.default_rng(0).normal(size=4000), 100)
        for budget, (value, error) in values.items()
    }


def test_what_is_sure_is_told_from_what_is_likely() -> None:
    found = break_of("cluster", "text", _kept(b8=(60, 5), b16=(85, 5), b32=(93, 5), b64=(99, 1)))
    # 60 +- 10 is below 90 for sure, 85 +- 10 is not; 93 is above it, and only 99 +- 2 is so for sure.
    assert found == Break("cluster", "text", budget=32, surely_kept=64, surely_broken=8)


def test_a_budget_counts_only_if_every_larger_one_holds_too() -> None:
    assert break_of("a", "b", _kept(b8=(95, 0.1), b16=(80, 0.1), b32=(95, 0.1))) == Break("a", "b", 32, 32, None)
    assert break_of("a", "b", _kept(b8=(50, 0.1), b16=(60, 0.1))) == Break("a", "b", None, None, 16)


def test_random_sampling_breaks_where_the_mean_over_its_seeds_does() -> None:
    asked = samples(["count"] * 100)
    full = summary(asked, {64: [True] * 100})
    # One seed alone keeps everything at 8 tokens; the mean over both is 80 %.
    seeds = [
        summary(asked, {8: [True] * 100, 16: [True] * 100}),
        summary(asked, {8: [True] * 60 + [False] * 40, 16: [True] * 100}),
    ]
    assert family_breaks("random", seeds, full, 64) == [Break("random", "general", 16, 16, 8)]


def test_kinds_of_questions_are_told_apart_by_task_and_benchmark() -> None:
    asked = samples(["word", "form", "relation", "bar_height", "count"])
    assert [kind_of(sample) for sample in asked] == ["text", "documents", "spatial", "charts", ""]
    assert kind_of(samples(["vqa"], benchmark="docvqa_val")[0]) == "documents"


def test_each_kind_is_measured_by_itself() -> None:
    asked = samples(["word"] * 50 + ["relation"] * 50)
    full = summary(asked, {64: [True] * 40 + [False] * 10 + [True] * 50})
    method = summary(asked, {8: [True] * 10 + [False] * 40 + [True] * 50})
    kept = kinds_kept({"method": [method]}, full, 64)
    assert set(kept) == {("method", "text"), ("method", "spatial")}
    assert kept["method", "text"][8].value == pytest.approx(25)
    interval = kept["method", "text"][8].interval
    # 10 of the 40 that the full model reads: as a proportion, 25 +- 13.
    assert interval.low == pytest.approx(25 - 13, abs=3)
    assert interval.high == pytest.approx(25 + 13, abs=3)
    assert kept["method", "spatial"][8].interval[:3] == (100, 100, 100)
