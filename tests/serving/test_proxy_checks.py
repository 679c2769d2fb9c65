"""Tests of how long Serve keeps a proxy that does not answer, with the environment that parcelray gives it."""

from typing import Any

import pytest
from ray.serve._private import proxy_state
from ray.serve.schema import ProxyStatus

from parcelray.serving.app import PROXY_VARIABLES


class Proxy:
    """A proxy whose health checks fail at once (`dead`), or only at their timeout."""

    actor_id = "a"
    worker_id = "w"
    log_file_path = "l"

    def __init__(self, clock: "Clock", *, dead: bool) -> None:
        self._clock = clock
        self._dead = dead
        self._asked_at: float | None = None

    def is_ready(self, timeout_s: float) -> bool:
        return True

    def is_healthy(self, timeout_s: float) -> bool | None:
        if self._asked_at is None:
            self._asked_at = self._clock.time()
            return None
        if not self._dead and self._clock.time() < self._asked_at + timeout_s:
            return None
        self._asked_at = None
        return False


class Clock:
    now = 0.0

    def time(self) -> float:
        return self.now


@pytest.mark.parametrize(("dead", "least_s", "most_s"), [(True, 1, 6), (False, 55, 70)])
def test_a_dead_proxy_is_replaced_in_seconds_and_a_busy_one_is_kept(
    monkeypatch: pytest.MonkeyPatch, dead: bool, least_s: float, most_s: float
) -> None:
    for name in ("PERIOD", "TIMEOUT"):
        value = float(PROXY_VARIABLES[f"RAY_SERVE_PROXY_HEALTH_CHECK_{name}_S"])
        monkeypatch.setattr(proxy_state, f"PROXY_HEALTH_CHECK_{name}_S", value)
    clock: Any = Clock()
    state = proxy_state.ProxyState(Proxy(clock, dead=dead), "proxy", "node", "127.0.0.1", "instance", timer=clock)  # type: ignore[arg-type]
    state.reconcile()
    assert state.status == ProxyStatus.HEALTHY
    while state.status == ProxyStatus.HEALTHY:
        # The controller's loop.
        clock.now += 0.1
        state.reconcile()
    assert least_s <= clock.now <= most_s
