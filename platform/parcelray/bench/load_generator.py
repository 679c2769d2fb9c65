"""A load of requests on the loopback, closed (each client asks when it was answered) or open (requests come when they come)."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp

from parcelray.config.serve import LOOPBACK
from parcelray.errors import UserError

MOST_IN_FLIGHT = 512
"""Requests of an open load that may be in flight: beyond them the load itself would be what is measured."""
_TIMEOUT_S = 120.0


@dataclass
class LoadResult:
    """What a load met."""

    seconds: float = 0.0
    """From the first request to the last answer."""
    latencies_s: list[float] = field(default_factory=list)
    """Of the answers."""
    first_tokens_s: list[float] = field(default_factory=list)
    """From sending a request to the first piece of its answer; empty unless the requests ask for a stream."""
    budgets: Counter[str] = field(default_factory=Counter)
    """Answers by the budget that they say they had."""
    statuses: Counter[int] = field(default_factory=Counter)
    """0: no answer at all."""
    new_tokens: int = 0
    """Tokens of all answers, as they say."""

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.statuses[200] / self.seconds

    @property
    def failed(self) -> int:
        """Requests without an answer."""
        return self.statuses.total() - self.statuses[200]

    def quantile(self, share: float) -> float:
        """Of the latencies, seconds; NaN without answers."""
        return _quantile(self.latencies_s, share)

    def first_token_quantile(self, share: float) -> float:
        """Of the times to the first piece, seconds; NaN without streams."""
        return _quantile(self.first_tokens_s, share)


def closed_loop(url: str, bodies: Sequence[bytes], *, clients: int) -> LoadResult:
    """So many clients share the bodies out; each sends its next one when it has its answer."""

    async def run() -> LoadResult:
        result = LoadResult()
        left = iter(bodies)

        async def client(session: aiohttp.ClientSession) -> None:
            for body in left:
                await _ask(session, url, body, result)

        async with _session(url, clients) as session:
            started = time.perf_counter()
            await asyncio.gather(*(client(session) for _ in range(clients)))
            result.seconds = time.perf_counter() - started
        return result

    return asyncio.run(run())


def open_loop(url: str, bodies: Sequence[bytes], *, rate: float, seed: int = 0) -> LoadResult:
    """Requests at random times, so many a second in the mean (a Poisson process), whether or not the earlier ones are answered."""

    async def run() -> LoadResult:
        result = LoadResult()
        rng = random.Random(seed)
        waits: set[asyncio.Task[None]] = set()
        async with _session(url, MOST_IN_FLIGHT) as session:
            started = due = time.perf_counter()
            for body in bodies:
                due += rng.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if len(waits) >= MOST_IN_FLIGHT:
                    result.statuses[0] += 1
                    continue
                wait = asyncio.create_task(_ask(session, url, body, result))
                waits.add(wait)
                wait.add_done_callback(waits.discard)
            await asyncio.gather(*waits)
            result.seconds = time.perf_counter() - started
        return result

    return asyncio.run(run())


def _session(url: str, connections: int) -> aiohttp.ClientSession:
    if urlsplit(url).hostname not in LOOPBACK:
        raise UserError(f"{url} is not on this machine; the load generator is for the loopback only.")
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections), timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)
    )


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, result: LoadResult) -> None:
    started = time.perf_counter()
    first_piece_s = None
    usage: dict[str, int] = {}
    try:
        async with session.post(url, data=body, headers={"content-type": "application/json"}) as response:
            status, headers = response.status, response.headers
            if response.content_type == "text/event-stream":
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    if first_piece_s is None:
                        first_piece_s = time.perf_counter() - started
                    usage = json.loads(line.removeprefix(b"data: ")).get("usage") or usage
            else:
                usage = (await response.json(content_type=None)).get("usage", {})
    except (aiohttp.ClientError, TimeoutError, ValueError):
        result.statuses[0] += 1
        return
    result.statuses[status] += 1
    if status != 200:
        return
    result.latencies_s.append(time.perf_counter() - started)
    result.budgets[headers.get("x-visual-tokens", "?")] += 1
    result.new_tokens += usage.get("completion_tokens", 0)
    if first_piece_s is not None:
        result.first_tokens_s.append(first_piece_s)


def _quantile(values: Sequence[float], share: float) -> float:
    found = sorted(values)
    return found[min(len(found) - 1, int(share * len(found)))] if found else float("nan")
