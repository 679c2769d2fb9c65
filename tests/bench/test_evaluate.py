"""`parcelray bench evaluate`: what it computes from times and memory, and the whole bench, in which sharing changes no answer."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parcelray.bench import evaluate as evaluate_bench
from parcelray.datasets.mini.suite import family_samples


def test_the_rate_leaves_out_the_time_before_the_first_bundle() -> None:
    times = iter([100.0, 110.0, 112.0, 118.0])
    clock = evaluate_bench._Clock(lambda: next(times))
    for rows in (64, 128, 192):
        clock.note("samples", rows, 192)
    assert clock.first() == 10.0
    assert clock.rate() == (192 - 64) / (118 - 110)


def test_answers_that_differ_are_counted_over_all_budgets() -> None:
    one = {16: ["a", "b"], 64: ["c", "d"], 256: ["e", "f"]}
    other = {16: ["a", "x"], 64: ["c", "d"], 256: ["y", "z"]}
    assert evaluate_bench._differing(one, one) == 0
    assert evaluate_bench._differing(one, other) == 3


def test_repeated_samples_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # As few as each comparison needs: two bundles of 64, five questions to an image.
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
    # The driver and the actor have loaded torch each, which takes more than 100 MiB of their own in any build.
    assert values["peak memory, 50 samples"] > 200
    assert (
        values["peak memory, 75 over 50 samples"]
        == values["peak memory, 75 samples"] / values["peak memory, 50 samples"]
    )
