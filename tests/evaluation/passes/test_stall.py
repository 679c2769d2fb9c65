"""The limit of a pass on the time without a finished shard."""

import queue

import pytest

from parcelray.evaluation.passes import ray_pass


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pass, "_STALL_POLL_S", 0.0)


def test_an_item_just_before_the_limit_is_returned_and_restarts_the_limit() -> None:
    items: queue.Queue[str] = queue.Queue()
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        if now in (14.0, 27.0):
            items.put(f"at {now:g} s")
        return now

    assert ray_pass._next(items, 15.0, clock) == "at 14 s"
    assert ray_pass._next(items, 15.0, clock) == "at 27 s"


def test_no_item_until_the_limit_is_a_stall() -> None:
    readings: list[float] = []

    def clock() -> float:
        readings.append(100.0 + len(readings))
        return readings[-1]

    with pytest.raises(queue.Empty):
        ray_pass._next(queue.Queue(), 15.0, clock)
    assert readings[-1] - readings[0] == 15.0


def test_an_item_that_has_arrived_is_no_stall_however_late_it_is_taken() -> None:
    items: queue.Queue[str] = queue.Queue()
    items.put("late")
    assert ray_pass._next(items, 0.0, lambda: 1e9) == "late"
