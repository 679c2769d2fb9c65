"""Bodies of requests, read within their limits of size and time, and within what a process may hold of all of them together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from parcelray.config.serve import RequestLimits
from parcelray.serving.http.api_errors import ApiError, too_many

_MIB = 1024**2
_CLOSE = {"connection": "close"}
"""The rest of a refused body is not read, so the connection cannot be used again."""


class Bodies:
    """The bodies that one process holds."""

    def __init__(self) -> None:
        self.held_bytes = 0

    @asynccontextmanager
    async def read(
        self, pieces: AsyncIterator[bytes], limits: RequestLimits, declared: str | None
    ) -> AsyncIterator[bytes]:
        """The whole body, which counts as held until the end of the context.

        Args:
            pieces: of the body, as they arrive.
            limits: of one body, and of all together.
            declared: the header Content-Length.

        Raises:
            ApiError: 413 for too many bytes, 408 for too slow ones, 429 where other bodies take all the memory.
        """
        longest = int(limits.body_mb * _MIB)
        too_large = ApiError(
            413, f"The body is larger than {limits.body_mb:g} MiB.", code="body_too_large", headers=_CLOSE
        )
        if declared is not None and declared.isdecimal() and int(declared[:20]) > longest:
            raise too_large
        found = bytearray()
        try:
            try:
                async with asyncio.timeout(limits.body_timeout_s):
                    async for piece in pieces:
                        if len(found) + len(piece) > longest:
                            raise too_large
                        # What a client only says that it will send takes no place; else a few slow ones would keep all
                        # of them.
                        self._check(len(piece), limits)
                        self.held_bytes += len(piece)
                        found += piece
            except TimeoutError:
                message = f"The body did not arrive within {limits.body_timeout_s:g} s."
                raise ApiError(408, message, code="body_timeout", headers=_CLOSE) from None
            yield bytes(found)
        finally:
            self.held_bytes -= len(found)

    def _check(self, size: int, limits: RequestLimits) -> None:
        if self.held_bytes + size > limits.bodies_mb * _MIB:
            refusal = too_many(
                "The bodies of other requests take all the memory for them; send the request again later.",
                code="queue_full",
                retry_after_s=1,
            )
            refusal.headers |= _CLOSE
            raise refusal
