"""Answers of an engine as something to wait for, in a coroutine or in a thread."""

import asyncio
import contextlib
import queue
from collections.abc import AsyncGenerator

from parcelray.serving.engine.engine import Engine, Event, Failed, Finished, GenerateRequest, Piece


async def events(engine: Engine, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
    """Pieces and the end of an answer; whoever stops listening cancels the request.

    Raises:
        EngineRefusal: the request was not taken, or given up.
    """
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(event: Event) -> None:
        # A loop that was closed has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(inbox.put_nowait, event)

    engine.submit(request, deliver)
    ended = False
    try:
        while not ended:
            event = await inbox.get()
            ended = not isinstance(event, Piece)
            if isinstance(event, Failed):
                raise event.refusal
            yield event
    finally:
        if not ended:
            engine.cancel(request.request_id)


async def answer(engine: Engine, request: GenerateRequest) -> Finished:
    """The end of an answer; cancelling the wait cancels the request.

    Raises:
        EngineRefusal: the request was not taken, or given up.
    """
    stream = events(engine, request)
    try:
        async for event in stream:
            if isinstance(event, Finished):
                return event
    finally:
        await stream.aclose()
    raise AssertionError("an engine ended a request without an end")


def answer_all(engine: Engine, requests: list[GenerateRequest]) -> list[Finished]:
    """Answers of many requests, submitted together, in their order.

    Raises:
        EngineRefusal: of the first that has none.
    """
    inbox: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    for index, request in enumerate(requests):
        engine.submit(request, lambda event, index=index: inbox.put((index, event)))  # type: ignore[misc]
    found: dict[int, Finished] = {}
    while len(found) < len(requests):
        index, event = inbox.get()
        if isinstance(event, Failed):
            raise event.refusal
        if isinstance(event, Finished):
            found[index] = event
    return [found[index] for index in range(len(requests))]
