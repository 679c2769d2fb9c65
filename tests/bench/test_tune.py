"""`parcelray bench tune`: its measures follow from known times; the whole bench runs every search to its end."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from parcelray.bench import tune as tune_bench
from parcelray.tuning.trial_record import FinishedTrial


def test_the_time_of_a_trial_is_the_slope_between_two_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search takes 7 s, a trial 4 s in its own process and 30 s on a worker, and the bare training 3 s."""
    rates = {True: iter([12.0, 30.0, 20.0]), False: iter([4.0, 5.0, 10.0])}

    def points_per_minute(folder: Path, checkpoint: object, samples: int, *, warm: bool) -> float:
        return next(rates[warm])

    def search_seconds(folder: Path, steps: int, count: int, workers: int) -> float:
        return 7.0 + count * (30.0 if workers else 4.0)

    monkeypatch.setattr(tune_bench, "ray_session", nullcontext)
    monkeypatch.setattr(tune_bench, "_supernet", lambda folder: None)
    monkeypatch.setattr(tune_bench, "_points_per_minute", points_per_minute)
    monkeypatch.setattr(tune_bench, "_bare_seconds", lambda folder, steps: 3.0)
    monkeypatch.setattr(tune_bench, "_search_seconds", search_seconds)
    messages: list[str] = []
    report = tune_bench.bench_tuning(samples=1, steps=2, repeats=3, say=messages.append)
    assert [(measure.name, measure.value, measure.unit, measure.goal) for measure in report.measures] == [
        ("split search, warm", 20.0, "points/min", None),
        ("split search, a process per point", 5.0, "points/min", None),
        # The median of the rounds' ratios 3, 6 and 2, not the ratio of the medians.
        ("warm over a process per point", 3.0, "ratio", ">= 3"),
        ("bare training, 2 steps", 3.0, "s", None),
        ("start of a search", 7.0, "s", None),
        ("training trial in its own process minus bare training", 1.0, "s", None),
        ("training trial on a Ray Train worker minus bare training", 27.0, "s", None),
    ]
    assert messages[0] == "round 1 of 3: split search, warm"
    assert messages[-1] == "round 3 of 3: 1 and 3 training trials on a Ray Train worker"


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_points_and_trials_are_measured(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two points and three trainings. Searches on Ray Train's workers are the same, with other workers.
    monkeypatch.setattr(tune_bench, "_GRIDS", (0, 1))
    monkeypatch.setattr(tune_bench, "_BUDGETS", ([16],))
    monkeypatch.setattr(tune_bench, "_MANY", 2)
    monkeypatch.setattr(tune_bench, "_WORKERS", {"in its own process": 0})
    ended: list[str] = []

    class Counts(tune_bench._Silent):
        """Counts the trials. The base class raises an error if a trial failed."""

        def finished(self, trial: FinishedTrial) -> None:
            super().finished(trial)
            ended.append(trial.key)

    monkeypatch.setattr(tune_bench, "_Silent", Counts)
    report = tune_bench.bench_tuning(samples=1, steps=2, repeats=1)
    assert len(ended) == 2 + 2 + 1 + 2, "points in warm actors, points in new processes, one training, two trainings"
    assert [measure.name for measure in report.measures] == [
        "split search, warm",
        "split search, a process per point",
        "warm over a process per point",
        "bare training, 2 steps",
        "start of a search",
        "training trial in its own process minus bare training",
    ]
