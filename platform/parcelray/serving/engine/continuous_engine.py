"""The engine over a transformers model: continuous batching of requests with different budgets, prompts and lengths.

One thread owns the model. Each turn of its loop it

1. takes what was submitted and cancelled, and drops what is past its deadline;
2. looks at one image that somebody wants to inspect;
3. takes the first requests of the queue as far as there is room: the vision tower runs over their new images, a budget
   is chosen for those that leave it open, room in the KV pool is reserved for all that they may ever hold, and the
   prefill runs in batches of similar length;
4. makes one decode step of all that run.

A request joins and leaves between two steps. Room is reserved at admission, so nothing that runs is ever thrown out
again. What fails takes along only those that it was done for; an engine whose turns keep failing ends, fails what it
has, and refuses the rest.
"""

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.budget_chooser import BudgetChooser
from parcelray.serving.engine.decoder import PooledDecoder, Prompt
from parcelray.serving.engine.engine import (
    EngineRefusal,
    EngineStats,
    GenerateRequest,
    ImagePixels,
    Inspection,
    Listener,
    check_request,
)
from parcelray.serving.engine.job import AnswerWriter, Job, by_length, end_ids
from parcelray.serving.engine.sampling import choose
from parcelray.serving.engine.vision import VisionStage

logger = logging.getLogger(__name__)
_MAX_FAILURES = 3
"""Times that one kind of work may fail, one after the other, before the engine calls itself broken."""
Work = Literal["vision", "prefill", "decode"]


@dataclass(frozen=True)
class EngineLimits:
    """What an engine holds at the same time."""

    max_running: int = 64
    """Requests that share a decode step."""
    max_waiting: int = 256
    """Requests in the queue before it."""
    kv_tokens: int = 32768
    """Tokens of the KV pool."""
    urgent_tokens: int = 64
    """Further tokens of it, and a row of the decode step, that only urgent requests get."""
    prefill_tokens: int = 8192
    """Prompt tokens that one turn prefills at most, or one request: what the running requests' next token waits for."""
    vision_batch: int = 32
    """Images per run of the vision tower, and new ones in one turn, or those of one request."""
    feature_cache_bytes: int = 256 * 1024**2
    """Patch features that are kept."""


class ContinuousEngine:
    """See the module's docstring; implements `parcelray.serving.engine.engine.Engine`.

    Args:
        model: in evaluation mode, on its device.
        processor: of the same checkpoint.
        limits: of memory and queue.
        name: in its statistics.
        chooser: of budgets that requests leave open; None: such requests are refused.
    """

    def __init__(
        self,
        model: ElasticVLM,
        processor: ElasticProcessor,
        limits: EngineLimits = EngineLimits(),
        *,
        name: str = "local",
        chooser: BudgetChooser | None = None,
    ) -> None:
        self._name = name
        self._limits = limits
        self._writer = AnswerWriter(processor.tokenizer, end_ids(model, processor))
        self.supported_budgets = tuple(model.supported_budgets)
        self._decoder = PooledDecoder(model, max_tokens=limits.kv_tokens, spare_tokens=limits.urgent_tokens)
        self._vision = VisionStage(
            model, processor, cache_bytes=limits.feature_cache_bytes, batch_size=limits.vision_batch
        )
        self._chooser = chooser
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._starting: list[Job] = []
        self._running: list[Job] = []
        self._inspections: deque[tuple[Future[Inspection], ImagePixels, int]] = deque()
        self._in_flight = 0
        self._lock = threading.Lock()
        self._closing = False
        self._ended = False
        self._failures: dict[Work, int] = {"vision": 0, "prefill": 0, "decode": 0}
        self._counts = dict.fromkeys(("steps", "decoded_rows", "prefill_batches", "prefilled"), 0)
        self._thread = threading.Thread(target=self._loop, name="parcelray-engine", daemon=True)
        self._thread.start()

    @property
    def max_request_tokens(self) -> int:
        """Prompt and answer of the longest request that can ever run."""
        return min(self._decoder.max_positions, self._decoder.pool.total_tokens)

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """See `Engine`."""
        check_request(request, self.max_request_tokens, self.supported_budgets, chooses=self._chooser is not None)
        job = self._writer.job(request, listener)
        with self._lock:
            if self._closing or self._ended:
                raise self._gone()
            if self._in_flight >= self._limits.max_running + self._limits.max_waiting and not request.urgent:
                raise EngineRefusal(
                    "queue_full", f"{self._in_flight} requests are in flight already; send the request again later."
                )
            self._in_flight += 1
            # Under the lock: what is put before the end is failed there, and nothing is put after it.
            self._commands.put(lambda: self._waiting.appendleft(job) if request.urgent else self._waiting.append(job))

    def cancel(self, request_id: str) -> None:
        """See `Engine`."""
        self._commands.put(
            lambda: self._fail_where(
                lambda job: job.request.request_id == request_id, "cancelled", "The request was cancelled."
            )
        )

    def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Future[Inspection]:
        """See `Engine`."""
        found: Future[Inspection] = Future()
        with self._lock:
            if self._closing or self._ended:
                found.set_exception(self._gone())
            else:
                self._commands.put(lambda: self._inspections.append((found, image, num_visual_tokens)))
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
        # While idle the loop sleeps until something comes.
        self._commands.put(lambda: None)
        self._thread.join()

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                while not self._closing and max(self._failures.values()) < _MAX_FAILURES:
                    self._take_commands()
                    self._turn()
        except Exception:  # a defect; those who wait must hear of it
            logger.exception("the engine's thread failed")
        finally:
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._ended = True
        while not self._commands.empty():
            self._take(self._commands.get())
        gone = self._gone()
        self._fail_where(lambda _: True, gone.code, gone.message)
        while self._inspections:
            found, *_ = self._inspections.popleft()
            if found.set_running_or_notify_cancel():
                found.set_exception(self._gone())

    def _gone(self) -> EngineRefusal:
        if self._closing:
            return EngineRefusal("shutting_down", "This replica is shutting down; send the request again.")
        return EngineRefusal("engine_error", "The engine of this replica is broken; send the request again.")

    def _take_commands(self) -> None:
        idle = not self._waiting and not self._running and not self._inspections
        # While idle it sleeps until something comes.
        if idle:
            self._take(self._commands.get())
        while not self._commands.empty():
            self._take(self._commands.get())

    def _take(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:  # one request's; the others know nothing of it
            logger.exception("a command of the engine failed")

    def _turn(self) -> None:
        now = time.perf_counter()
        self._fail_where(
            lambda job: job.expires <= now, "deadline_exceeded", "The request was not finished by its deadline."
        )
        self._inspect_next()
        self._starting = self._next_jobs()
        if self._starting:
            self._start(self._starting)
            self._starting = []
        if self._running:
            self._attempt("decode", list(self._running), self._step)

    def _inspect_next(self) -> None:
        """One a turn: those who wait for a token must not wait for all who want to look at an image."""
        while self._inspections:
            found, image, num_visual_tokens = self._inspections.popleft()
            if not found.set_running_or_notify_cancel():
                continue
            try:
                inspection = self._vision.inspect(image, num_visual_tokens)
            except Exception:  # as in `_attempt`
                logger.exception("an image could not be inspected")
                found.set_exception(EngineRefusal("engine_error", "The image cannot be inspected at this budget."))
            else:
                found.set_result(inspection)
            return

    def _attempt(self, kind: Work, jobs: list[Job], work: Callable[[list[Job]], None]) -> None:
        """Does a part of the work for some requests; if it fails, so do they, and no others."""
        try:
            work(jobs)
        except Exception as error:  # the loop must outlive a failed batch, whatever failed in it
            logger.exception("%s of %d requests failed", kind, len(jobs))
            too_large = kind == "prefill" and len(jobs) > 1 and isinstance(error, torch.OutOfMemoryError)
        else:
            self._failures[kind] = 0
            return
        # Not above: an exception that is being handled keeps all that its frames hold in memory.
        if too_large:
            for half in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]):
                self._attempt(kind, half, work)
            return
        self._failures[kind] += 1
        for job in jobs:
            if not job.ended:
                self._fail(job, "engine_error", "The engine failed on this batch of requests; send the request again.")

    def _next_jobs(self) -> list[Job]:
        """The first requests of the queue that one turn can start; none overtakes another, so that a large one is not starved."""
        jobs: list[Job] = []
        tokens = images = blocks = 0
        while self._waiting:
            job = self._waiting[0]
            tokens += job.request.least_prompt_tokens
            images += (
                sum(image.content not in self._vision.cache for image in job.request.images)
                if job.features is None
                else 0
            )
            blocks += self._decoder.pool.blocks_for(job.least_tokens)
            if len(self._running) + len(
                jobs
            ) >= self._limits.max_running + job.request.urgent or blocks > self._free_blocks(job):
                break
            if jobs and (tokens > self._limits.prefill_tokens or images > self._limits.vision_batch):
                break
            jobs.append(self._waiting.popleft())
        return jobs

    def _free_blocks(self, job: Job) -> int:
        pool = self._decoder.pool
        return pool.free_blocks if job.request.urgent else pool.free_blocks - pool.spare_blocks

    def _start(self, jobs: list[Job]) -> None:
        now = time.perf_counter()
        for job in jobs:
            job.started = now
        unseen = [job for job in jobs if job.request.images and job.features is None]
        if unseen:
            self._attempt("vision", unseen, self._see)
        for job in jobs:
            if job.request.choices and not job.ended:
                self._choose_budget(job)
        for batch in by_length(self._admit([job for job in jobs if not job.ended])):
            self._attempt("prefill", batch, self._prefill)

    def _see(self, jobs: list[Job]) -> None:
        encoded = self._vision.encode(image for job in jobs for image in job.request.images)
        for job in jobs:
            contents = [image.content for image in job.request.images]
            job.features = {content: encoded.features[content] for content in contents}
            job.cached_images = sum(content not in encoded.new for content in contents)
            job.vision_s = encoded.seconds if job.cached_images < len(contents) else 0.0

    def _choose_budget(self, job: Job) -> None:
        assert self._chooser is not None, "checked at its arrival"
        assert job.features is not None, "seen before"
        try:
            job.request = self._chooser.settled(job.request, job.features, self.max_request_tokens)
        except Exception:  # as in `_attempt`
            logger.exception("no budget could be chosen")
            self._fail(job, "engine_error", "The engine could not choose a budget for this request; name one.")

    def _admit(self, jobs: list[Job]) -> list[Job]:
        """Reserves room for the first ones; where budgets came out too large for all, the rest goes back to the head of the queue."""
        pool = self._decoder.pool
        tokens = 0
        for number, job in enumerate(jobs):
            tokens += job.request.num_prompt_tokens
            if pool.blocks_for(job.most_tokens) > self._free_blocks(job) or (
                number and tokens > self._limits.prefill_tokens
            ):
                self._waiting.extendleft(reversed(jobs[number:]))
                jobs = jobs[:number]
                break
            job.blocks = pool.reserve(job.most_tokens)
        self._running += jobs
        return jobs

    def _prefill(self, jobs: list[Job]) -> None:
        before = time.perf_counter()
        features = {content: found for job in jobs for content, found in (job.features or {}).items()}
        visual = self._vision.compress([job.request for job in jobs], features)
        logits_BV = self._decoder.prefill(
            [
                Prompt(job.request.prompt_ids, job.request.visual_offset, visual_KL, job.blocks)
                for job, visual_KL in zip(jobs, visual, strict=True)
            ],
        )
        self._counts["prefill_batches"] += 1
        self._counts["prefilled"] += len(jobs)
        for job in jobs:
            job.length = job.request.num_prompt_tokens
            # What it saw is in the pool now.
            job.features = None
            job.first_token_at = time.perf_counter()
            job.prefill_s = job.first_token_at - before
        self._advance(jobs, logits_BV)

    def _step(self, jobs: list[Job]) -> None:
        logits_BV = self._decoder.decode(
            [job.last_token for job in jobs], [job.length for job in jobs], [job.blocks for job in jobs]
        )
        self._counts["steps"] += 1
        self._counts["decoded_rows"] += len(jobs)
        for job in jobs:
            job.length += 1
        self._advance(jobs, logits_BV)

    def _advance(self, jobs: list[Job], logits_BV: Tensor) -> None:
        """Gives each job its next token, tells who listens, and lets the finished ones go.

        What fails for one row fails that job alone.
        """
        tokens = self._choose_tokens(jobs, logits_BV)
        for job, token, logits_V in zip(jobs, tokens, logits_BV, strict=True):
            try:
                if token is None:
                    raise ArithmeticError("there is no likeliest token")
                reason = self._writer.append(job, token, logits_V)
                if reason is not None:
                    self._let_go(job)
                    self._writer.finish(job, reason, self.stats())
            except Exception:  # as in `_attempt`
                logger.exception("a request has no next token")
                if not job.ended:
                    self._fail(job, "engine_error", "The model gave no next token for this request.")

    def _choose_tokens(self, jobs: list[Job], logits_BV: Tensor) -> list[int | None]:
        try:
            return choose(logits_BV, [job.request.sampling for job in jobs], [job.generator for job in jobs])
        except Exception:  # as in `_attempt`
            if len(jobs) == 1:
                logger.exception("no token could be chosen")
                return [None]
        return [token for row, job in enumerate(jobs) for token in self._choose_tokens([job], logits_BV[row : row + 1])]

    def _fail_where(self, doomed: Callable[[Job], bool], code: str, message: str) -> None:
        for job in [job for job in itertools.chain(self._waiting, self._starting, self._running) if doomed(job)]:
            if not job.ended:
                self._fail(job, code, message)

    def _fail(self, job: Job, code: str, message: str) -> None:
        self._let_go(job)
        self._writer.fail(job, code, message)

    def _let_go(self, job: Job) -> None:
        job.ended = True
        job.features = None
        for group in (self._waiting, self._running):
            if job in group:
                group.remove(job)
        self._decoder.pool.release(job.blocks)
        job.blocks = []
        with self._lock:
            self._in_flight -= 1
