"""What an engine is to the rest of serving: requests in, events out.

Another engine takes its place by implementing `Engine`.

Nothing here imports torch, so the ingress, which has no model, shares these types with the replicas that have one.
"""

from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from parcelray.errors import ParcelrayError

FinishReason = Literal["stop", "length"]


class EngineRefusal(ParcelrayError):
    """The engine did not take a request, or gave it up; `code` says why.

    Args:
        code: `context_length_exceeded` (it can never fit), `unsupported_budget`, `queue_full`, `deadline_exceeded`,
            `cancelled`, `shutting_down` or `engine_error`.
        message: one sentence without paths or internals.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.code, self.message))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    """Longest answer, tokens, the end token included."""
    temperature: float = 0.0
    """0: the likeliest token, as in evaluation."""
    top_p: float = 1.0
    """Probability mass that is sampled from."""
    seed: int | None = None
    """Of the request's own generator; None: a fresh one."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""
    logprobs: int | None = None
    """Likeliest tokens to report at each place beside the chosen one; None: no log-probabilities."""


@dataclass(frozen=True, slots=True)
class ImagePixels:
    """One image at the model's input size, 8 bits a channel."""

    content: str
    """SHA-256 of `rgb`, the key of the feature cache; different for different images."""
    side: int
    """Pixels of a side."""
    rgb: bytes
    """side x side x 3, row-major."""
    kept: bool = True
    """Whether its features come from the cache where they are, and stay in it.

    Not those of a health check, which is to run the vision tower.
    """


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One answer to make."""

    request_id: str
    """Unique among those in flight."""
    prompt_ids: tuple[int, ...]
    """Token ids of the text, without image placeholders."""
    visual_offset: int
    """Tokens of the prompt that stand before the visual tokens."""
    images: tuple[ImagePixels, ...]
    """In the order of the prompt."""
    num_visual_tokens: int
    """The budget of each image; 0 without images. Of those in `choices` the largest."""
    sampling: Sampling
    """How tokens are chosen."""
    timeout_s: float
    """Time from arrival at the engine after which the request is given up, seconds."""
    stream: bool = False
    """Whether pieces of the answer are wanted as they come."""
    urgent: bool = False
    """Goes before the queue, into room that is kept for it: health checks, which must not wait for the load that they watch."""
    choices: tuple[int, ...] = ()
    """Budgets that the engine may choose among by image and question, ascending; empty: `num_visual_tokens` it is."""

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of all images together."""
        return len(self.images) * self.num_visual_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the decoder's input."""
        return len(self.prompt_ids) + self.num_image_tokens

    @property
    def least_prompt_tokens(self) -> int:
        """The same at the smallest budget that it may get."""
        return len(self.prompt_ids) + len(self.images) * (self.choices[0] if self.choices else self.num_visual_tokens)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the logarithm of its probability under the model, before temperature."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens at that place."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that the parts of one request took."""

    queue_s: float
    """From arrival to the start of its prefill."""
    vision_s: float
    """Of the vision tower's batch that it was in; 0: every image was in the cache."""
    prefill_s: float
    """Of the prefill's batch that it was in."""
    first_token_s: float
    """From arrival to the first token."""
    total_s: float
    """From arrival to the last token."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that the answer went on with; empty where the first token is no whole character."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    num_visual_tokens: int = 0
    """The budget that each image got."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing, and has done since its start."""

    engine: str = ""
    """Which engine, where there are several."""
    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0
    """Tokens of the KV cache that are reserved."""
    kv_tokens_total: int = 0
    feature_cache_hits: int = 0
    feature_cache_misses: int = 0
    feature_cache_bytes: int = 0
    steps: int = 0
    """Decode steps."""
    decoded_rows: int = 0
    """Requests over all decode steps: divided by `steps`, how many shared one."""
    prefill_batches: int = 0
    prefilled: int = 0
    """Requests over all prefill batches."""
    load_s: float = 0.0
    """From the start of its replica until its model was loaded and warmed up."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer."""

    text: str
    """All of it, white space at its ends left out."""
    reason: FinishReason
    """`stop`: the end token or a stop text; `length`: as long as it may be."""
    num_new_tokens: int
    """Tokens made, the end token included."""
    timings: Timings
    cached_images: int
    """Images whose features were in the cache."""
    logprobs: tuple[TokenLogprob, ...] = ()
    stats: EngineStats = field(default_factory=EngineStats)
    """The engine at that moment."""
    num_visual_tokens: int = 0
    """The budget that each image got."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request without an answer."""

    refusal: EngineRefusal


Event = Piece | Finished | Failed
Listener = Callable[[Event], None]
"""Called from the engine's thread: it must return at once."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a model makes of one image at one budget, for people to look at."""

    anchor_grid: int
    """Side of the grid of pooled anchors; 0: none."""
    grid: int
    """Side of the patch grid."""
    attention: tuple[float, ...]
    """How much the queries look at each patch, row-major, mean over the queries, 1 at the largest; empty without queries."""


class Engine(Protocol):
    """Makes answers, many at a time."""

    @property
    def supported_budgets(self) -> tuple[int, ...]:
        """Legal values of `num_visual_tokens`, ascending."""
        ...

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """Queues a request; `listener` gets its pieces (if streamed) and then exactly one `Finished` or `Failed`.

        Raises:
            EngineRefusal: it can never fit, the queue is full, or the engine is closing or broken.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Gives a request up, before the next step; unknown ids are ignored."""
        ...

    def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Future[Inspection]:
        """Looks at one image, between two steps; a future that was cancelled by then costs nothing."""
        ...

    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        ...

    def close(self) -> None:
        """Fails what is in flight and ends the engine."""
        ...


def check_request(request: GenerateRequest, max_tokens: int, budgets: Collection[int], *, chooses: bool) -> None:
    """Refuses what an engine can never answer.

    Args:
        request: that has just arrived.
        max_tokens: that prompt and answer may hold.
        budgets: that the model gives.
        chooses: whether the engine chooses budgets that are left open.

    Raises:
        EngineRefusal: it does not fit, or asks for a budget that is not to be had.
    """
    most = request.least_prompt_tokens + request.sampling.max_new_tokens
    if most > max_tokens:
        raise EngineRefusal(
            "context_length_exceeded",
            f"{request.least_prompt_tokens} prompt tokens and {request.sampling.max_new_tokens} new ones are {most},"
            f" but a request may hold {max_tokens}; shorten the prompt, or lower max_tokens or the visual-token"
            " budget.",
        )
    for budget in (request.num_visual_tokens, *request.choices) if request.images else ():
        if budget not in budgets:
            raise EngineRefusal("unsupported_budget", f"{budget} visual tokens is no budget of this model.")
    if request.choices and not chooses:
        raise EngineRefusal("unsupported_budget", "This engine chooses no budgets; name one.")
