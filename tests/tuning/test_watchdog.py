"""The watchdog distinguishes a search in which something computes from one in which nothing does."""

import pytest

from parcelray.errors import SystemFailure
from parcelray.tuning import trial_resources
from parcelray.tuning.trial_resources import TrialResources, Watchdog
from parcelray.tuning.tune_run import last_line


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    return now


def test_trials_that_run_without_their_workers_are_reported(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = [True]
    monkeypatch.setattr(trial_resources, "_has_worker_group", lambda resources: placed[0])
    watchdog = Watchdog(TrialResources(0.01, workers=2, worker_cpus=1.0), 60.0, clock=lambda: clock[0])
    for _ in range(30):
        clock[0] += 20.0
        watchdog.check(running=4, waiting=0)
    placed[0] = False
    clock[0] += 50.0
    watchdog.check(running=4, waiting=0)
    watchdog.reset()
    clock[0] += 50.0
    watchdog.check(running=4, waiting=0)
    clock[0] += 20.0
    with pytest.raises(
        SystemFailure,
        match=r"4 trials are running, but none of them got its workers for 60 s: each requests 2 workers of 1 CPU",
    ):
        watchdog.check(running=4, waiting=0)


def test_trials_that_compute_themselves_may_take_long_but_waiting_trials_may_not(clock: list[float]) -> None:
    watchdog = Watchdog(TrialResources(1.0), 60.0, clock=lambda: clock[0])
    clock[0] += 500.0
    watchdog.check(running=1, waiting=3)
    clock[0] += 500.0
    watchdog.check(running=0, waiting=0)
    clock[0] += 61.0
    with pytest.raises(
        SystemFailure,
        match=(
            r"3 trials have waited for 60 s and none is running: each requests 1 CPU; the cluster has 4 CPU, of which"
            r" 1 CPU are free"
        ),
    ):
        watchdog.check(running=0, waiting=3)


def test_the_reason_of_a_failure_is_the_last_line_of_its_traceback() -> None:
    assert last_line("Traceback\n  here\nparcelray.errors.UserError: too large\n\n") == "UserError: too large"
    assert last_line("\n \n") == ""
