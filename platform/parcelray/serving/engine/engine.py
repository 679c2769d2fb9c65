"""The interface of an engine: how requests are built and submitted, and how their events are awaited.

Another engine can be used by implementing `Engine`. Nothing here imports torch, so the ingress, which has no model,
shares these types with the replicas, which have one.
"""

import asyncio
import contextlib
import hashlib
import queue
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from PIL import Image

from parcelray.errors import ParcelrayError
from parcelray.models.token_counts import TokenCounts, count_tokens

if TYPE_CHECKING:
    from parcelray.models.backbones.processor_base import ElasticProcessor

FinishReason = Literal["stop", "length"]


class EngineRefusal(ParcelrayError):
    """The engine rejected a request or aborted it; `code` gives the reason.

    Args:
        code: `context_length_exceeded` (it can never fit), `unsupported_budget`, `queue_full`, `deadline_exceeded`,
            `cancelled`, `shutting_down`, `engine_error` or `no_replica`.
        message: one sentence for the client, without paths or internals.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.code, self.message))


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings of a request: how each next token is chosen."""

    max_new_tokens: int
    """Maximum length of the answer in tokens, including the end token."""
    temperature: float = 0.0
    """0 takes the most likely token, as evaluation does."""
    top_p: float = 1.0
    """Probability mass to sample from."""
    seed: int | None = None
    """Seed of the request's own random generator; None: not reproducible."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it."""
    logprobs: int | None = None
    """Number of most likely tokens to report at each position, next to the chosen one; None: no log-probabilities."""


@dataclass(frozen=True, slots=True)
class ImagePixels:
    """One image at the model's input size, 8 bits per channel."""

    content: str
    """SHA-256 of `rgb`, the key of the feature cache."""
    side: int
    """Width and height, pixels."""
    rgb: bytes
    """Pixel values, side x side x 3, row-major."""
    use_cache: bool = True
    """Whether its features are read from and written to the feature cache.

    False for health checks, which must run the vision tower.
    """


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request for one answer."""

    request_id: str
    """Unique among the requests in flight."""
    prompt_ids: tuple[int, ...]
    """Token ids of the text, without image placeholders."""
    visual_offset: int
    """Number of prompt tokens before the visual tokens."""
    images: tuple[ImagePixels, ...]
    """Images in the order of the prompt."""
    num_visual_tokens: int
    """Visual-token budget per image; 0 without images. With `choices`, the largest of them."""
    sampling: Sampling
    """Sampling settings."""
    timeout_s: float
    """Seconds from arrival at the engine until the request is aborted."""
    stream: bool = False
    """Whether parts of the answer are sent as they are generated."""
    urgent: bool = False
    """Whether the request skips the queue and uses reserved memory: for health checks, which must not wait for load."""
    choices: tuple[int, ...] = ()
    """Budgets, ascending, from which the engine chooses by image and question; empty: `num_visual_tokens` is used."""

    @property
    def tokens(self) -> TokenCounts:
        """Visual and text tokens of the prompt."""
        return self.tokens_at(self.num_visual_tokens)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the decoder's input, tokens."""
        return self.tokens.total

    @property
    def min_prompt_tokens(self) -> int:
        """Length of the decoder's input at the smallest budget the request may get, tokens."""
        return self.tokens_at(self.smallest_budget).total

    @property
    def smallest_budget(self) -> int:
        """Smallest budget that the request may get."""
        return self.choices[0] if self.choices else self.num_visual_tokens

    def tokens_at(self, budget: int) -> TokenCounts:
        """Returns the visual and text tokens of the prompt at a budget."""
        return count_tokens(len(self.prompt_ids), len(self.images), budget)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability under the model, before temperature."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    """The most likely tokens at that position with their log-probabilities."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of the parts of one request, seconds."""

    queue_s: float
    """Time from arrival at the engine to the loop iteration that starts the request."""
    vision_s: float
    """Duration of the vision-tower batch that held its images; 0: every image was in the cache."""
    prefill_s: float
    """Duration of its prefill batch."""
    first_token_s: float
    """Time from arrival at the engine to the first token."""
    total_s: float
    """Time from arrival at the engine to the last token."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of a streamed answer; its text is empty when the first token is not yet a whole character."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    num_visual_tokens: int = 0
    """Visual-token budget that each image got."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The current load of an engine and its counters since its start."""

    engine: str = ""
    """Name of the engine, which distinguishes replicas."""
    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0
    """Tokens of the KV cache that are reserved."""
    kv_tokens_total: int = 0
    feature_cache_hits: int = 0
    feature_cache_misses: int = 0
    feature_cache_bytes: int = 0
    steps: int = 0
    """Number of decode steps."""
    decoded_rows: int = 0
    """Sum of batch sizes over all decode steps; divided by `steps`, the mean batch size."""
    prefill_batches: int = 0
    prefilled: int = 0
    """Number of requests over all prefill batches."""
    load_s: float = 0.0
    """Seconds from the start of the replica until its model was loaded and warmed up."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer, with the whole answer."""

    text: str
    """The whole answer, without leading and trailing white space."""
    reason: FinishReason
    """`stop`: the end token or a stop string; `length`: the maximum length."""
    num_new_tokens: int
    """Number of generated tokens, including the end token."""
    timings: Timings
    cached_images: int
    """Number of images whose features were in the cache."""
    logprobs: tuple[TokenLogprob, ...] = ()
    stats: EngineStats = field(default_factory=EngineStats)
    """Statistics of the engine at that moment."""
    num_visual_tokens: int = 0
    """Visual-token budget that each image got."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request without an answer."""

    refusal: EngineRefusal


Event = Piece | Finished | Failed
Listener = Callable[[Event], None]
"""Receives the events of one request in the engine's thread, so it must return at once."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The compression of one image by the connector at one budget, for display in the playground."""

    anchor_grid: int
    """Side length of the grid of pooled anchors; 0: no anchors."""
    grid: int
    """Side length of the patch grid."""
    attention: tuple[float, ...]
    """Attention of the queries to each patch, row-major, mean over queries, maximum 1; empty without queries."""


class Engine(Protocol):
    """Generates the answers of many requests at the same time."""

    @property
    def supported_budgets(self) -> tuple[int, ...]:
        """Supported values of `num_visual_tokens`, ascending."""
        ...

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """Queues a request; `listener` gets its pieces (if streamed) and then exactly one `Finished` or `Failed`.

        Raises:
            EngineRefusal: it can never fit, the queue is full, or the engine is closing or broken.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Aborts a request before the next step; unknown ids are ignored."""
        ...

    def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Future[Inspection]:
        """Computes the inspection of one image between two steps; a future cancelled before then costs nothing."""
        ...

    def stats(self) -> EngineStats:
        """Returns the current statistics."""
        ...

    def close(self) -> None:
        """Fails the requests in flight and stops the engine."""
        ...


class PromptBuilder:
    """Builds the requests for the engine of one checkpoint; needs its processor, not its model.

    Args:
        processor: processor of the checkpoint.
    """

    def __init__(self, processor: "ElasticProcessor") -> None:
        self._processor = processor
        self._offset = processor.visual_offset
        self.image_size = processor.image_size
        self.crops = processor.crops

    def pixels(self, image: Image.Image) -> ImagePixels:
        """Scales an image to the model's input size and hashes it."""
        rgb = self._processor.fitted(image).tobytes()
        return ImagePixels(hashlib.sha256(rgb).hexdigest(), self.image_size, rgb)

    def request(
        self,
        request_id: str,
        text: str,
        images: Sequence[ImagePixels],
        *,
        num_visual_tokens: int,
        sampling: Sampling,
        timeout_s: float,
        stream: bool = False,
        urgent: bool = False,
    ) -> GenerateRequest:
        """Builds one request; see `GenerateRequest` for the arguments."""
        ids = self._processor.encode_prompts([text], with_image=bool(images))[0]
        offset = self._offset if images else 0
        budget = num_visual_tokens if images else 0
        return GenerateRequest(
            request_id, tuple(ids), offset, tuple(images), budget, sampling, timeout_s, stream, urgent
        )


async def events(engine: Engine, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
    """Yields the events of a request: its pieces, if streamed, and its end. Closing the generator cancels the request.

    Raises:
        EngineRefusal: the request was rejected or aborted.
    """
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(event: Event) -> None:
        # After the loop is closed, nobody waits for the event.
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


async def last_event(stream: AsyncGenerator[Piece | Finished, None]) -> Finished:
    """Returns the end of an answer out of its events; cancelling the wait closes the stream."""
    async with aclosing(stream):
        async for event in stream:
            if isinstance(event, Finished):
                return event
    raise AssertionError("a stream of events ended without a Finished event")


def answer_all(engine: Engine, requests: list[GenerateRequest]) -> list[Finished]:
    """Submits many requests together and returns their answers in the same order.

    Raises:
        EngineRefusal: of the first request that has no answer.
    """
    inbox: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    for index, request in enumerate(requests):
        engine.submit(request, lambda event, index=index: inbox.put((index, event)))  # type: ignore[misc]
    answers: dict[int, Finished] = {}
    while len(answers) < len(requests):
        index, event = inbox.get()
        if isinstance(event, Failed):
            raise event.refusal
        if isinstance(event, Finished):
            answers[index] = event
    return [answers[index] for index in range(len(requests))]


def check_request(
    request: GenerateRequest,
    max_tokens: int,
    budgets: Collection[int],
    *,
    chooses: bool,
    max_positions: int,
    positions_per_image: int | None,
) -> None:
    """Rejects a request that an engine can never answer.

    Args:
        request: a request that has just arrived.
        max_tokens: maximum number of prompt and answer tokens of one request.
        budgets: visual-token budgets that the model supports.
        chooses: whether the engine can choose a budget from `request.choices`.
        max_positions: number of rotary positions of the model.
        positions_per_image: positions that an image takes at every budget; None: one for each visual token.

    Raises:
        EngineRefusal: the request does not fit, or needs a budget that is not supported.
    """
    new = request.sampling.max_new_tokens
    needed = request.min_prompt_tokens
    if needed + new > max_tokens:
        raise EngineRefusal(
            "context_length_exceeded",
            f"The request needs {needed} prompt tokens and {new} new tokens, but one request may hold {max_tokens}"
            " tokens; shorten the prompt, or lower max_tokens or the visual-token budget.",
        )
    positions = len(request.prompt_ids) + len(request.images) * (positions_per_image or 0) + new
    if positions > max_positions:
        raise EngineRefusal(
            "context_length_exceeded",
            f"The request needs {positions} positions, because an image takes {positions_per_image} at every budget,"
            f" but the model has {max_positions}; send fewer images, shorten the prompt or lower max_tokens.",
        )
    for budget in (request.num_visual_tokens, *request.choices) if request.images else ():
        if budget not in budgets:
            raise EngineRefusal(
                "unsupported_budget",
                f"visual_tokens is {budget}; this model supports {len(budgets)} budgets from {min(budgets)} to"
                f" {max(budgets)}.",
            )
    if request.choices and not chooses:
        raise EngineRefusal("unsupported_budget", "This engine has no budget predictor; set visual_tokens to a number.")
