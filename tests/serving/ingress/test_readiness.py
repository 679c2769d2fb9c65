"""Tests of the readiness probe, which concurrent callers share."""

import asyncio
from typing import Any

import pytest

from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.ingress.clients import Readiness, ReplicaLost


class Client:
    """A client that counts probes."""

    def __init__(self, error: Exception | None = None) -> None:
        self.probes = 0
        self._error = error

    async def ping(self) -> None:
        self.probes += 1
        await asyncio.sleep(0.01)
        if self._error is not None:
            raise self._error


def test_one_probe_serves_all_callers_within_a_second() -> None:
    now = [0.0]
    client: Any = Client()

    async def run() -> None:
        readiness = Readiness(lambda: now[0])
        await asyncio.gather(*(readiness.check(client) for _ in range(50)))
        await readiness.check(client)
        assert client.probes == 1
        now[0] = 1.5
        await readiness.check(client)
        assert client.probes == 2
        other: Any = Client()
        await readiness.check(other)
        assert other.probes == 1

    asyncio.run(run())


def test_a_cancelled_caller_does_not_cancel_the_probe_of_others() -> None:
    client: Any = Client(ReplicaLost())

    async def run() -> None:
        readiness = Readiness()
        impatient = asyncio.create_task(readiness.check(client))
        await asyncio.sleep(0)
        others = [asyncio.create_task(readiness.check(client)) for _ in range(3)]
        await asyncio.sleep(0)
        impatient.cancel()
        found = await asyncio.gather(*others, return_exceptions=True)
        assert [(error.status, error.code) for error in found if isinstance(error, ApiError)] == [
            (503, "not_ready")
        ] * 3
        assert client.probes == 1

    asyncio.run(run())


def test_a_failed_probe_is_repeated_after_a_second() -> None:
    now = [0.0]
    client: Any = Client(ReplicaLost())

    async def run() -> None:
        readiness = Readiness(lambda: now[0])
        for at in (0.0, 0.5, 2.0):
            now[0] = at
            with pytest.raises(ApiError):
                await readiness.check(client)
        assert client.probes == 2

    asyncio.run(run())
