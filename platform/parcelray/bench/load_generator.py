"""Load generator for the loopback: a closed loop (a fixed number of clients) or an open loop (random arrival times)."""

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
"""Most requests of an open loop in flight. Beyond this number, the load generator itself would be the bottleneck."""
_TIMEOUT_S = 120.0


@dataclass
class LoadResult:
    """Latencies and statuses of one load."""

    seconds: float = 0.0
    """Seconds from the first request to the last response."""
    latencies_s: list[float] = field(default_factory=list)
    """Latency of each successful request, in seconds."""
    first_tokens_s: list[float] = field(default_factory=list)
    """Seconds from sending a request to the first streamed token; empty for requests without streaming."""
    budgets: Counter[str] = field(default_factory=Counter)
    """Number of responses by visual-token budget, as the response headers report it."""
    statuses: Counter[int] = field(default_factory=Counter)
    """Number of responses by HTTP status; 0: no response."""
    new_tokens: int = 0
    """Tokens of all answers, as the responses report them."""

    @property
    def rate(self) -> float:
        """Successful requests per second."""
        return self.statuses[200] / self.seconds

    @property
    def failed(self) -> int:
        """Number of requests that did not succeed."""
        return self.statuses.total() - self.statuses[200]

    def quantile(self, share: float) -> float:
        """Returns a quantile of the latencies in seconds; NaN if no request succeeded."""
        return _quantile(self.latencies_s, share)

    def first_token_quantile(self, share: float) -> float:
        """Returns a quantile of the times to the first token in seconds; NaN without streaming."""
        return _quantile(self.first_tokens_s, share)


def closed_loop(url: str, bodies: Sequence[bytes], *, clients: int) -> LoadResult:
    """Sends the bodies from a fixed number of clients. Each client sends its next request after its last response."""

    async def run() -> LoadResult:
        result = LoadResult()
        left = iter(bodies)

        async def client(session: aiohttp.ClientSession) -> None:
            for body in left:
                await _send(session, url, body, result)

        async with _session(url, clients) as session:
            started = time.perf_counter()
            await asyncio.gather(*(client(session) for _ in range(clients)))
            result.seconds = time.perf_counter() - started
        return result

    return asyncio.run(run())


def open_loop(url: str, bodies: Sequence[bytes], *, rate: float, seed: int = 0) -> LoadResult:
    """Sends the bodies at random times (a Poisson process) with `rate` requests per second on average.

    It does not wait for earlier responses.
    """

    async def run() -> LoadResult:
        result = LoadResult()
        rng = random.Random(seed)
        pending: set[asyncio.Task[None]] = set()
        async with _session(url, MOST_IN_FLIGHT) as session:
            started = due = time.perf_counter()
            for body in bodies:
                due += rng.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if len(pending) >= MOST_IN_FLIGHT:
                    result.statuses[0] += 1
                    continue
                task = asyncio.create_task(_send(session, url, body, result))
                pending.add(task)
                task.add_done_callback(pending.discard)
            await asyncio.gather(*pending)
            result.seconds = time.perf_counter() - started
        return result

    return asyncio.run(run())


def _session(url: str, connections: int) -> aiohttp.ClientSession:
    if urlsplit(url).hostname not in LOOPBACK:
        raise UserError(f"{url} is not on this machine; the load generator only sends to the loopback.")
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections), timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)
    )


async def _send(session: aiohttp.ClientSession, url: str, body: bytes, result: LoadResult) -> None:
    started = time.perf_counter()
    first_token_s = None
    usage: dict[str, int] = {}
    try:
        async with session.post(url, data=body, headers={"content-type": "application/json"}) as response:
            status, headers = response.status, response.headers
            if response.content_type == "text/event-stream":
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    if first_token_s is None:
                        first_token_s = time.perf_counter() - started
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
    if first_token_s is not None:
        result.first_tokens_s.append(first_token_s)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
