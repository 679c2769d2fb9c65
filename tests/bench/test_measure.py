"""Bench reports, alternate timing, and peak memory on the CPU."""

import io
import json
import math
import os

import pytest
import torch
from rich.console import Console

from parcelray.bench.measure import (
    Measure,
    PairTiming,
    Report,
    interquartile_range,
    machine_info,
    peak_memory_bytes,
    time_pairs,
)

CPU = torch.device("cpu")
KIB = 1024


def _rendered(report: Report) -> str:
    output = io.StringIO()
    Console(width=200, file=output).print(report.to_rich())
    return output.getvalue()


def test_json_has_exactly_the_documented_keys() -> None:
    report = Report(
        (Measure("time", 1.5, "ms", spread=0.1, goal="<= 2", against="pooling"),), machine={"cpu": "x", "cores": 2}
    )
    assert json.loads(report.to_json()) == {
        "measures": [{"name": "time", "value": 1.5, "unit": "ms", "spread": 0.1, "goal": "<= 2", "against": "pooling"}],
        "machine": {"cpu": "x", "cores": 2},
    }


def test_nan_becomes_null() -> None:
    content = json.loads(Report((Measure("time", math.nan, "ms"),), machine={}).to_json())
    assert content["measures"][0]["value"] is None


@pytest.mark.parametrize(
    ("value", "goal", "missed"),
    [
        (2.0, "<= 2", False),
        (2.1, "<= 2", True),
        (0.5, ">= 0.5", False),
        (0.4, ">= 0.5", True),
        (math.nan, "<= 2", True),
        (9.0, None, False),
    ],
)
def test_goals_are_compared_with_values(value: float, goal: str | None, missed: bool) -> None:
    assert Measure("m", value, "x", goal=goal).missed is missed


def test_a_missed_goal_is_printed_as_missed() -> None:
    text = _rendered(
        Report(
            (Measure("slow", 3.0, "s", goal="<= 2"), Measure("fast", 1.0, "s", goal="<= 2"), Measure("free", 1.0, "s")),
            machine={},
        )
    )
    by_name = {
        line.split()[1]: line for line in text.splitlines() if any(name in line for name in ("slow", "fast", "free"))
    }
    assert "MISSED" in by_name["slow"]
    assert "met" in by_name["fast"]
    assert "MISSED" not in by_name["fast"] + by_name["free"]


def test_a_goal_in_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="goal '< 2' must be"):
        Measure("m", 1.0, "x", goal="< 2")


def test_pairs_run_alternately_after_the_warmup() -> None:
    calls: list[str] = []
    now = 0.0

    def call(name: str) -> None:
        nonlocal now
        calls.append(name)
        rounds = calls.count(name) - 2
        # The warm-up takes long and is not timed. Then `a` takes 2, 4 and 6 seconds, and `b` always 2.
        now += 100 if rounds < 1 else 2 * rounds if name == "a" else 2

    timing = time_pairs(lambda: call("a"), lambda: call("b"), repeats=3, warmup=2, clock=lambda: now)
    assert calls == ["a", "b"] * 5
    assert timing == PairTiming(median_a=4, median_b=2, ratio=2, spread_a=2, spread_b=0, spread_ratio=1)


def test_timing_waits_for_the_device() -> None:
    calls: list[str] = []
    time_pairs(
        lambda: calls.append("a"),
        lambda: calls.append("b"),
        repeats=1,
        warmup=0,
        synchronize=lambda: calls.append("sync"),
    )
    assert calls == ["sync", "a", "sync", "sync", "b", "sync"]


def test_zero_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats 0"):
        time_pairs(lambda: None, lambda: None, repeats=0)


def test_interquartile_range() -> None:
    assert interquartile_range([5.0, 1.0, 3.0, 2.0, 4.0]) == 2.0
    assert interquartile_range([7.0]) == 0.0


def test_machine_info_describes_cpu_and_torch() -> None:
    info = machine_info()
    assert {"cpu", "cores", "python", "torch", "torch_threads"} <= info.keys()
    assert info["cores"] == len(os.sched_getaffinity(0))
    assert info["torch_threads"] == torch.get_num_threads()


def test_live_results_add_up() -> None:
    def call() -> torch.Tensor:
        first = torch.zeros(KIB, dtype=torch.uint8)
        second = first + 1
        return second + 1

    assert peak_memory_bytes(call, CPU) == 3 * KIB


def test_freed_results_do_not_count() -> None:
    def call() -> torch.Tensor:
        x = torch.zeros(KIB, dtype=torch.uint8)
        for _ in range(5):
            x = x + 1
        return x

    assert peak_memory_bytes(call, CPU) == 2 * KIB


def test_inputs_views_and_in_place_operations_allocate_nothing() -> None:
    given = torch.zeros(KIB, dtype=torch.uint8)
    assert peak_memory_bytes(lambda: given.view(32, 32).t().add_(1), CPU) == 0
