"""Takes what a source gives as soon as it gives it, however slowly it is read on."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def read_ahead(source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The items of a source, which is read at its own pace; closing this closes the source.

    What was read and not yet taken is kept: the source must be bounded, as the answer of a request is.
    """
    found: asyncio.Queue[T | None] = asyncio.Queue()

    async def read() -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    found.put_nowait(item)
        finally:
            found.put_nowait(None)

    reading = asyncio.create_task(read())
    try:
        while (item := await found.get()) is not None:
            yield item
        await reading
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await reading
