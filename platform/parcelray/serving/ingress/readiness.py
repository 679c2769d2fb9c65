"""Whether the model answers, for all who ask: one probe at a time, and none while the last one is fresh."""

import asyncio
from collections.abc import Callable
from time import monotonic

from parcelray.serving.engine.engine import EngineRefusal
from parcelray.serving.http.api_errors import ApiError, from_refusal
from parcelray.serving.ingress.clients import ModelClient, ReplicaLost

_TIMEOUT_S = 10.0
_FRESH_S = 1.0


class Readiness:
    """Probes a model on the way that requests take.

    Everybody may ask, and a probe goes before requests, so they share it.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._client: ModelClient | None = None
        self._probe: asyncio.Task[ApiError | None] | None = None
        self._ended = 0.0

    async def check(self, client: ModelClient) -> None:
        """Returns once the model has answered, or did within the last second.

        Raises:
            ApiError: it does not answer.
        """
        if (
            self._probe is None
            or client is not self._client
            or (self._probe.done() and self._clock() - self._ended > _FRESH_S)
        ):
            self._client = client
            self._probe = asyncio.create_task(self._ask(client))
        # Who hangs up does not take the probe away from the others.
        refusal = await asyncio.shield(self._probe)
        if refusal is not None:
            raise ApiError(refusal.status, refusal.message, code=refusal.code, headers=refusal.headers)

    async def _ask(self, client: ModelClient) -> ApiError | None:
        try:
            await asyncio.wait_for(client.ping(), _TIMEOUT_S)
        except (TimeoutError, ReplicaLost):
            return ApiError(503, "The model does not answer.", code="not_ready", headers={"retry-after": "1"})
        except EngineRefusal as refusal:
            return from_refusal(refusal, 1)
        finally:
            self._ended = self._clock()
        return None
