"""`parcelray bench evaluate`: its measures follow from known times and memory; the whole bench runs."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from parcelray.bench import evaluate as evaluate_bench
from parcelray.bench.measure import PairTiming
from parcelray.datasets.mini.suite import family_samples
from parcelray.datasets.sample import Sample


def test_the_rate_excludes_the_time_before_the_first_shard() -> None:
    times = iter([100.0, 110.0, 112.0, 118.0])
    clock = evaluate_bench._Clock(lambda: next(times))
    for rows in (64, 128, 192):
        clock.note("samples", rows, 192)
    assert clock.first() == 10.0
    assert clock.rate() == (192 - 64) / (118 - 110)


def test_different_answers_are_counted_over_all_budgets() -> None:
    one = {16: ["a", "b"], 64: ["c", "d"], 256: ["e", "f"]}
    other = {16: ["a", "x"], 64: ["c", "d"], 256: ["y", "z"]}
    assert evaluate_bench._count_different(one, one) == 0
    assert evaluate_bench._count_different(one, other) == 3


def test_repeated_samples_have_unique_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_bench, "_DIFFERENT", 4)
    reader = evaluate_bench._Repeated("samples", evaluate_bench._export(tmp_path / "few", 4), 10)
    assert reader.fingerprint().rows == 10
    samples = [sample for row in reader.order() for sample in reader.read(row).samples]
    assert len({sample.id for sample in samples}) == 10
    assert [dataclasses.replace(sample, id="") for sample in samples[4:8]] == [
        dataclasses.replace(sample, id="") for sample in samples[:4]
    ]
    assert len({sample.prompt + str(sample.images) for sample in samples}) == 4
    assert samples[0].images == family_samples("test", "general", 1)[0].images


class _Predictor:
    """Generates other answers to two of the samples when it is called with all budgets at once."""

    def generate_budgets(self, samples: list[Sample], budgets: Sequence[int]) -> dict[int, list[str]]:
        num_changed = 2 if len(budgets) == len(evaluate_bench.BUDGETS) else 0
        return {budget: ["b"] * num_changed + ["a"] * (len(samples) - num_changed) for budget in budgets}


def test_one_pass_is_compared_with_one_pass_per_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def time_pairs(apart: Callable[[], object], together: Callable[[], object], repeats: int) -> PairTiming:
        for call in (apart, together):
            results = call()
            calls.append(f"{len(results) if isinstance(results, list) else 1} passes, {repeats} repeats")
        return PairTiming(3.0, 2.0, 1.5, 0.1, 0.1, 0.2)

    monkeypatch.setattr(evaluate_bench, "Predictor", lambda *_, **__: _Predictor())
    monkeypatch.setattr(evaluate_bench, "time_pairs", time_pairs)
    model: Any = (None, None)
    speed, different = evaluate_bench._one_pass("vision-heavy", model, repeats=4)
    assert calls == ["3 passes, 4 repeats", "1 passes, 4 repeats"]
    assert (speed.value, speed.spread, speed.goal, speed.missed) == (1.5, 0.2, ">= 1.8", True)
    # Two samples at each of three budgets.
    assert (different.value, different.missed) == (6, True)
    assert next(evaluate_bench._one_pass("mini", model, repeats=4)).goal is None


@pytest.mark.parametrize(("larger_mib", "missed"), [(330, False), (360, True)])
def test_peak_memory_must_not_grow_with_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, larger_mib: int, missed: bool
) -> None:
    peaks = {50: 300 * 2**20, 75: larger_mib * 2**20}
    monkeypatch.setattr(evaluate_bench, "_export", lambda folder, count: folder)
    monkeypatch.setattr(evaluate_bench, "_random", lambda config: None)
    monkeypatch.setattr(evaluate_bench, "_save", lambda model, folder: None)
    monkeypatch.setattr(evaluate_bench, "_run_in_new_process", lambda call, arguments: peaks[arguments[2]])
    small, large, ratio = evaluate_bench._memory(tmp_path, (50, 75))
    assert [(small.value, small.unit), (large.value, large.unit)] == [(300, "MiB"), (larger_mib, "MiB")]
    assert ratio.value == pytest.approx(larger_mib / 300)
    assert ratio.missed is missed


def test_the_memory_of_descendants_is_counted() -> None:
    holds_memory = "data = bytearray(b'x' * 2**26); print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", holds_memory], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert child.pid in evaluate_bench._descendants(os.getpid())
        assert evaluate_bench._proportional_bytes(child.pid) >= 2**26
        child.communicate(b"\n")
    assert child.pid not in evaluate_bench._descendants(os.getpid())
    assert evaluate_bench._proportional_bytes(child.pid) == 0


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_all_four_comparisons_are_measured(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_bench, "_QUESTIONS", 6)
    monkeypatch.setattr(evaluate_bench, "_IMAGES", 5)
    monkeypatch.setattr(evaluate_bench, "_DIFFERENT", 75)
    report = evaluate_bench.bench_evaluation(samples=128, repeats=1, memory_samples=(50, 75))
    assert [(measure.name, measure.unit, measure.goal) for measure in report.measures] == [
        ("mini: one pass over 3 budgets", "times faster", None),
        ("mini: answers that differ", "answers", "<= 0"),
        ("vision-heavy: one pass over 3 budgets", "times faster", ">= 1.8"),
        ("vision-heavy: answers that differ", "answers", "<= 0"),
        ("mini: 5 questions that share an image", "times faster", None),
        ("mini: answers that differ", "answers", "<= 0"),
        ("plain loop, 128 samples", "samples/s", None),
        ("ray data, 128 samples", "samples/s", None),
        ("ray data over plain loop", "ratio", ">= 0.9"),
        ("ray data: until the first bundle is stored", "s", None),
        ("peak memory, 50 samples", "MiB", None),
        ("peak memory, 75 samples", "MiB", None),
        ("peak memory, 75 over 50 samples", "ratio", "<= 1.15"),
    ]
    values = {measure.name: measure.value for measure in report.measures}
    assert [measure.value for measure in report.measures if measure.name.endswith("answers that differ")] == [0, 0, 0]
    # Driver and actor each load torch, which takes more than 100 MiB in any build.
    assert values["peak memory, 50 samples"] > 200
