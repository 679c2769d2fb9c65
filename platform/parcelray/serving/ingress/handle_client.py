"""A model in deployments of Ray Serve, reached over its handle."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from parcelray.serving.engine.engine import (
    EngineRefusal,
    EngineStats,
    Failed,
    Finished,
    GenerateRequest,
    ImagePixels,
    Inspection,
    Piece,
)
from parcelray.serving.ingress.clients import ReplicaLost


class HandleClient:
    """A model in deployments of Ray Serve.

    Args:
        handle: of the model's deployment.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)

    async def answer(self, request: GenerateRequest) -> Finished:
        """See `ModelClient`."""
        end: Finished | Failed = await self._call(self._handle.answer.remote(request))
        return _checked(end)

    async def events(self, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
        """See `ModelClient`."""
        response: Any = self._streams.events.remote(request)
        ended = False
        try:
            async for event in response:
                ended = not isinstance(event, Piece)
                yield event if isinstance(event, Piece) else _checked(event)
        except (RayActorError, DeploymentUnavailableError):
            raise ReplicaLost from None
        except BackPressureError:
            raise _full() from None
        except RayTaskError:
            raise _failed() from None
        finally:
            if not ended:
                response.cancel()

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """See `ModelClient`."""
        found: Inspection = await self._call(self._handle.inspect.remote(image, num_visual_tokens))
        return found

    async def stats(self) -> EngineStats:
        """See `ModelClient`."""
        found: EngineStats = await self._call(self._handle.stats.remote())
        return found

    async def ping(self) -> None:
        """See `ModelClient`."""
        await self._call(self._handle.ping.remote())

    async def _call(self, response: Any) -> Any:
        try:
            return await response
        except asyncio.CancelledError:
            # Serve cancels what a request has started, but now and then it misses one (ray#52533).
            response.cancel()
            raise
        except (RayActorError, DeploymentUnavailableError):
            raise ReplicaLost from None
        except BackPressureError:
            raise _full() from None
        except RayTaskError:
            raise _failed() from None


def _checked(end: Finished | Failed) -> Finished:
    if isinstance(end, Failed):
        raise end.refusal
    return end


def _failed() -> EngineRefusal:
    return EngineRefusal("engine_error", "The replica failed on this request; send it again.")


def _full() -> EngineRefusal:
    return EngineRefusal(
        "queue_full", "Every replica has as many requests as it can hold; send the request again later."
    )
