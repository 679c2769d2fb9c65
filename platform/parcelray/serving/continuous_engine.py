"""The engine over a transformers model: continuous batching of requests with different budgets, prompts and lengths.

One thread owns the model. Each turn of its loop it

1. takes what was submitted and cancelled, and drops what is past its deadline;
2. admits requests in their order while the KV pool has room for all that they may ever hold: the vision tower runs over their new images
   in one batch, the prefill in batches of similar length;
3. makes one decode step of all that run.

A request joins and leaves between two steps. Room is reserved at admission, so nothing that runs is ever thrown out again.
"""

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.decoder import PooledDecoder, Prompt
from parcelray.serving.engine import (
    EngineRefusal,
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    ImagePixels,
    Inspection,
    Listener,
    Piece,
    Timings,
    TokenLogprob,
)
from parcelray.serving.sampling import choose, generator_of, logprobs_of
from parcelray.serving.text_stream import TextStream
from parcelray.serving.vision import Seen, VisionStage

logger = logging.getLogger(__name__)
_PADDING = 0.25
"""Of a prefill batch's area, at most; longer and shorter prompts then go into another batch."""
_MAX_FAILURES = 3
"""Turns that may fail one after the other before the engine calls itself broken."""


@dataclass(frozen=True)
class EngineLimits:
    """What an engine holds at the same time."""

    max_running: int = 64
    """Requests that share a decode step."""
    max_waiting: int = 256
    """Requests in the queue before it."""
    kv_tokens: int = 32768
    """Tokens of the KV pool."""
    prefill_tokens: int = 8192
    """Prompt tokens that one turn prefills at most: what the running requests' next token waits for."""
    vision_batch: int = 32
    """Images per run of the vision tower."""
    feature_cache_bytes: int = 256 * 1024**2
    """Patch features that are kept."""


@dataclass
class _Job:
    """A request on its way."""

    request: GenerateRequest
    listener: Listener
    arrived: float
    text: TextStream
    generator: torch.Generator | None
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    """Its tokens in the pool."""
    last_token: int = 0
    num_new: int = 0
    prefill_started: float = 0.0
    prefill_s: float = 0.0
    first_token_at: float = 0.0
    seen: Seen = field(default_factory=lambda: Seen(None, 0, 0.0))
    logprobs: list[TokenLogprob] = field(default_factory=list)
    unsent: list[TokenLogprob] = field(default_factory=list)

    @property
    def most_tokens(self) -> int:
        """The pool's tokens that it may ever hold: the last new token is never attended to."""
        return self.request.num_prompt_tokens + self.request.sampling.max_new_tokens - 1

    @property
    def expires(self) -> float:
        return self.arrived + self.request.timeout_s


class ContinuousEngine:
    """See the module's docstring; implements `parcelray.serving.engine.Engine`.

    Args:
        model: in evaluation mode, on its device.
        processor: of the same checkpoint.
        limits: of memory and queue.
        name: in its statistics.
    """

    def __init__(
        self,
        model: ElasticVLM,
        processor: ElasticProcessor,
        limits: EngineLimits = EngineLimits(),
        *,
        name: str = "local",
    ) -> None:
        self._name = name
        self._limits = limits
        self._tokenizer = processor.tokenizer
        self._end_ids = _end_ids(model, processor)
        self.supported_budgets = tuple(model.supported_budgets)
        self._decoder = PooledDecoder(model, max_tokens=limits.kv_tokens)
        self._vision = VisionStage(model, processor, cache_bytes=limits.feature_cache_bytes, batch_size=limits.vision_batch)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._in_flight = 0
        self._lock = threading.Lock()
        self._closing = False
        self._failures = 0
        self._counts = dict.fromkeys(("steps", "decoded_rows", "prefill_batches", "prefilled"), 0)
        self._thread = threading.Thread(target=self._loop, name="parcelray-engine", daemon=True)
        self._thread.start()

    @property
    def max_request_tokens(self) -> int:
        """Prompt and answer of the longest request that can ever run."""
        return min(self._decoder.max_positions, self._decoder.pool.total_tokens)

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """See `Engine`."""
        most = request.num_prompt_tokens + request.sampling.max_new_tokens
        if most > self.max_request_tokens:
            raise EngineRefusal(
                "context_length_exceeded",
                f"{request.num_prompt_tokens} prompt tokens and {request.sampling.max_new_tokens} new ones are {most}, but a request may hold "
                f"{self.max_request_tokens}; shorten the prompt, or lower max_tokens or the visual-token budget.",
            )
        if request.images and request.num_visual_tokens not in self.supported_budgets:
            raise EngineRefusal("unsupported_budget", f"{request.num_visual_tokens} visual tokens is no budget of this model.")
        with self._lock:
            if self._closing or self._failures >= _MAX_FAILURES:
                raise EngineRefusal("shutting_down", "This replica is shutting down; send the request again.")
            if self._in_flight >= self._limits.max_running + self._limits.max_waiting and not request.urgent:
                raise EngineRefusal("queue_full", f"{self._in_flight} requests are in flight already; send the request again later.")
            self._in_flight += 1
        job = _Job(request, listener, time.perf_counter(), TextStream(self._tokenizer, request.sampling.stop), generator_of(request.sampling))
        self._commands.put(lambda: self._waiting.appendleft(job) if request.urgent else self._waiting.append(job))

    def cancel(self, request_id: str) -> None:
        """See `Engine`."""
        self._commands.put(lambda: self._fail_where(lambda job: job.request.request_id == request_id, "cancelled", "The request was cancelled."))

    def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Future[Inspection]:
        """See `Engine`."""
        found: Future[Inspection] = Future()

        def look() -> None:
            try:
                found.set_result(self._vision.inspect(image, num_visual_tokens))
            except Exception:  # as in the loop
                logger.exception("an image could not be inspected")
                found.set_exception(EngineRefusal("engine_error", "The image cannot be inspected at this budget."))

        self._commands.put(look)
        return found

    def stats(self) -> EngineStats:
        """See `Engine`. Read without a lock: each number is right, their sum need not be of one moment."""
        pool, cache = self._decoder.pool, self._vision.cache
        return EngineStats(
            engine=self._name,
            running=len(self._running),
            waiting=max(0, self._in_flight - len(self._running)),
            kv_tokens_used=pool.used_tokens,
            kv_tokens_total=pool.total_tokens,
            feature_cache_hits=cache.hits,
            feature_cache_misses=cache.misses,
            feature_cache_bytes=cache.bytes,
            **self._counts,
        )

    def close(self) -> None:
        """See `Engine`."""
        with self._lock:
            self._closing = True
        self._commands.put(lambda: self._fail_where(lambda _: True, "shutting_down", "This replica is shutting down; send the request again."))
        self._thread.join()

    def _loop(self) -> None:
        with torch.inference_mode():
            while not (self._closing and not self._in_flight):
                self._take_commands()
                try:
                    self._turn()
                    self._failures = 0
                except Exception:  # the loop must outlive a failed batch, whatever failed in it
                    logger.exception("a turn of the engine failed")
                    self._failures += 1
                    self._fail_where(lambda job: bool(job.blocks), "engine_error", "The engine failed on this batch of requests; send the request again.")

    def _take_commands(self) -> None:
        idle = not self._waiting and not self._running
        # While idle it sleeps until something comes; `close` sends something, too.
        with contextlib.suppress(queue.Empty):
            self._commands.get(block=idle)()
            while True:
                self._commands.get_nowait()()

    def _turn(self) -> None:
        now = time.perf_counter()
        self._fail_where(lambda job: job.expires <= now, "deadline_exceeded", "The request was not finished by its deadline.")
        if admitted := self._admit():
            self._prefill(admitted)
        if self._running:
            self._step()

    def _admit(self) -> list[_Job]:
        """Reserves room for the first requests of the queue; none overtakes another, so that a large one is not starved."""
        admitted: list[_Job] = []
        tokens = 0
        pool = self._decoder.pool
        while self._waiting and len(self._running) + len(admitted) < self._limits.max_running:
            job = self._waiting[0]
            tokens += job.request.num_prompt_tokens
            if pool.blocks_for(job.most_tokens) > pool.free_blocks or (admitted and tokens > self._limits.prefill_tokens):
                break
            self._waiting.popleft()
            job.blocks = pool.reserve(job.most_tokens)
            admitted.append(job)
        # They count as running from here on, so that a failure finds them and gives their blocks back.
        self._running += admitted
        return admitted

    def _prefill(self, jobs: list[_Job]) -> None:
        started = time.perf_counter()
        for job, seen in zip(jobs, self._vision.see([job.request for job in jobs]), strict=True):
            job.seen = seen
            job.prefill_started = started
        for batch in _by_length(jobs):
            before = time.perf_counter()
            logits_BV = self._decoder.prefill(
                [Prompt(job.request.prompt_ids, job.request.visual_offset, job.seen.visual_KL, job.blocks) for job in batch],
            )
            self._counts["prefill_batches"] += 1
            self._counts["prefilled"] += len(batch)
            for job in batch:
                job.length = job.request.num_prompt_tokens
                # The tokens are in the pool now; kept on, they would pin the whole batch's.
                job.seen = job.seen._replace(visual_KL=None)
                job.first_token_at = time.perf_counter()
                job.prefill_s = job.first_token_at - before
            self._advance(batch, logits_BV)

    def _step(self) -> None:
        jobs = list(self._running)
        logits_BV = self._decoder.decode([job.last_token for job in jobs], [job.length for job in jobs], [job.blocks for job in jobs])
        self._counts["steps"] += 1
        self._counts["decoded_rows"] += len(jobs)
        for job in jobs:
            job.length += 1
        self._advance(jobs, logits_BV)

    def _advance(self, jobs: list[_Job], logits_BV: Tensor) -> None:
        """Gives each job its next token, tells who listens, and lets the finished ones go."""
        tokens = choose(logits_BV, [job.request.sampling for job in jobs], [job.generator for job in jobs])
        for row, (job, token) in enumerate(zip(jobs, tokens, strict=True)):
            job.last_token = token
            job.num_new += 1
            ended = token in self._end_ids
            if job.request.sampling.logprobs is not None and not ended:
                job.unsent.append(self._logprob(logits_BV[row], token, job.request.sampling.logprobs))
            piece = "" if ended else job.text.push(token)
            if ended or job.text.stopped:
                self._finish(job, "stop", piece)
            elif job.num_new == job.request.sampling.max_new_tokens:
                self._finish(job, "length", piece)
            elif piece and job.request.stream:
                self._send(job, piece)

    def _send(self, job: _Job, piece: str) -> None:
        _tell(job, Piece(piece, tuple(job.unsent)))
        job.logprobs += job.unsent
        job.unsent.clear()

    def _finish(self, job: _Job, reason: FinishReason, piece: str) -> None:
        piece += job.text.finish()
        if job.request.stream and (piece or job.unsent):
            self._send(job, piece)
        now = time.perf_counter()
        timings = Timings(
            queue_s=job.prefill_started - job.arrived,
            vision_s=job.seen.seconds,
            prefill_s=job.prefill_s,
            first_token_s=job.first_token_at - job.arrived,
            total_s=now - job.arrived,
        )
        self._let_go(job)
        logprobs = (*job.logprobs, *job.unsent)
        _tell(job, Finished(job.text.text, reason, job.num_new, timings, job.seen.cached_images, logprobs, self.stats()))

    def _logprob(self, logits_V: Tensor, token: int, top: int) -> TokenLogprob:
        found = logprobs_of(logits_V, token, top)
        best = tuple((self._token_text(each), value) for each, value in zip(found.ids, found.logprobs, strict=True))
        return TokenLogprob(self._token_text(token), found.logprob, best)

    def _token_text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _fail_where(self, doomed: Callable[[_Job], bool], code: str, message: str) -> None:
        for job in [job for job in itertools.chain(self._waiting, self._running) if doomed(job)]:
            self._let_go(job)
            _tell(job, Failed(EngineRefusal(code, message)))

    def _let_go(self, job: _Job) -> None:
        (self._running if job.blocks else self._waiting).remove(job)
        self._decoder.pool.release(job.blocks)
        job.blocks = []
        with self._lock:
            self._in_flight -= 1


def _tell(job: _Job, event: Event) -> None:
    try:
        job.listener(event)
    except Exception:  # whoever listens must not end the thread that answers everyone
        logger.exception("a listener of the engine failed")


def _end_ids(model: ElasticVLM, processor: ElasticProcessor) -> frozenset[int]:
    """Tokens that end an answer, as `generate` reads them off the checkpoint."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in (*listed, processor.tokenizer.eos_token_id) if token is not None)


def _by_length(jobs: list[_Job]) -> Iterator[list[_Job]]:
    """Batches of similar length, so that little of them is padding."""
    batch: list[_Job] = []
    for job in sorted(jobs, key=lambda job: job.request.num_prompt_tokens):
        longest = job.request.num_prompt_tokens
        used = sum(each.request.num_prompt_tokens for each in batch) + longest
        if batch and used < (1 - _PADDING) * longest * (len(batch) + 1):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch
