"""The engine over a transformers model: continuous batching of requests with different budgets, prompts and lengths.

One thread owns the model. Each iteration of its loop

1. processes submissions and cancellations, and aborts requests past their deadline;
2. computes one pending inspection of an image;
3. starts the first requests of the queue as far as memory allows: the vision tower encodes their new images, a budget
   is chosen where the request leaves it open, KV memory is reserved for the longest possible answer, the connector or
   the reducer is applied, and the prefill runs in batches of similar length;
4. runs one decode step of all running requests.

Requests join and leave between two steps. Memory is reserved at admission, so no running request is ever preempted. A
failure affects only the requests of the failed batch. After several failures in a row the engine stops, fails all its
requests and rejects new ones.
"""

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

import torch
from torch import Tensor

from parcelray.config.reducer import ReducerConfig
from parcelray.config.serve import EngineConfig
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.decoding import NOT_FINITE, end_token_ids
from parcelray.models.model_reducer import ModelReducer
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
from parcelray.serving.engine.kv_pool import NO_BLOCKS
from parcelray.serving.engine.request_state import AnswerWriter, RequestState, by_length
from parcelray.serving.engine.sampling import choose
from parcelray.serving.engine.vision import VisionStage

logger = logging.getLogger(__name__)
_MAX_FAILURES = 3
"""Number of consecutive failures of one stage after which the engine stops."""
_NO_TOKEN = "The engine could not choose the next token of this request; retry the request."
Stage = Literal["vision", "prefill", "decode"]
DEFAULT_CONFIG = EngineConfig()


class ContinuousEngine:
    """See the module's docstring; implements `parcelray.serving.engine.engine.Engine`.

    Args:
        model: model in evaluation mode, on its device.
        processor: processor of the same checkpoint.
        config: limits of memory, batches and the queue.
        urgent_tokens: additional KV memory for urgent requests, tokens.
        name: name of the engine in its statistics.
        chooser: chooses budgets that requests leave open; None: such requests are rejected.
        reducer: training-free reducer of the model; None: the model's connector provides the budgets.
    """

    def __init__(
        self,
        model: ElasticVLM,
        processor: ElasticProcessor,
        config: EngineConfig = DEFAULT_CONFIG,
        *,
        urgent_tokens: int = 64,
        name: str = "local",
        chooser: BudgetChooser | None = None,
        reducer: ReducerConfig | None = None,
    ) -> None:
        self._name = name
        self._config = config
        self._writer = AnswerWriter(processor.tokenizer, end_token_ids(model, processor.tokenizer))
        reduced = ModelReducer(model, reducer) if reducer is not None else None
        self.supported_budgets = tuple(model.supported_budgets if reduced is None else reduced.supported_budgets)
        self._decoder = PooledDecoder(model, max_tokens=config.kv_tokens, spare_tokens=urgent_tokens, reducer=reduced)
        self._vision = VisionStage(
            model,
            processor,
            cache_bytes=config.feature_cache_mb * 1024**2,
            batch_size=config.vision_batch,
            reducer=reduced,
        )
        self._chooser = chooser
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[RequestState] = deque()
        self._starting: list[RequestState] = []
        self._running: list[RequestState] = []
        self._inspections: deque[tuple[Future[Inspection], ImagePixels, int]] = deque()
        self._in_flight = 0
        self._lock = threading.Lock()
        self._closing = False
        self._ended = False
        self._failures: dict[Stage, int] = {"vision": 0, "prefill": 0, "decode": 0}
        self._counts = dict.fromkeys(("steps", "decoded_rows", "prefill_batches", "prefilled"), 0)
        self._thread = threading.Thread(target=self._loop, name="parcelray-engine", daemon=True)
        self._thread.start()

    @property
    def max_request_tokens(self) -> int:
        """Maximum number of prompt and answer tokens of one request, as the mean over the layers."""
        return min(self._decoder.max_positions, self._decoder.pool.total_tokens - self._decoder.rounding_tokens)

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """See `Engine`."""
        check_request(
            request,
            self.max_request_tokens,
            self.supported_budgets,
            chooses=self._chooser is not None,
            max_positions=self._decoder.max_positions,
            positions_per_image=self._decoder.positions_per_image,
        )
        state = self._writer.new_state(request, listener)
        with self._lock:
            if self._closing or self._ended:
                raise self._stopped()
            if self._in_flight >= self._config.max_running + self._config.max_waiting and not request.urgent:
                raise EngineRefusal(
                    "queue_full", f"The queue is full ({self._in_flight} requests in flight); retry the request later."
                )
            self._in_flight += 1
            # Under the lock: `_end` fails every command put before it, and none is put after it.
            put = self._waiting.appendleft if request.urgent else self._waiting.append
            self._commands.put(lambda: put(state))

    def cancel(self, request_id: str) -> None:
        """See `Engine`."""
        self._commands.put(
            lambda: self._fail_where(
                lambda state: state.request.request_id == request_id, "cancelled", "The request was cancelled."
            )
        )

    def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Future[Inspection]:
        """See `Engine`."""
        result: Future[Inspection] = Future()
        with self._lock:
            if self._closing or self._ended:
                result.set_exception(self._stopped())
            else:
                self._commands.put(lambda: self._inspections.append((result, image, num_visual_tokens)))
        return result

    def stats(self) -> EngineStats:
        """See `Engine`. Read without a lock: each number is correct, but they may be of different moments."""
        pool, cache = self._decoder.pool, self._vision.cache
        return EngineStats(
            engine=self._name,
            running=len(self._running),
            waiting=max(0, self._in_flight - len(self._running)),
            kv_tokens_used=pool.used_tokens,
            kv_tokens_total=pool.total_tokens,
            feature_cache_hits=cache.hits,
            feature_cache_misses=cache.misses,
            feature_cache_bytes=cache.num_bytes,
            **self._counts,
        )

    def close(self) -> None:
        """See `Engine`."""
        with self._lock:
            self._closing = True
        # Wakes the loop if it is idle.
        self._commands.put(lambda: None)
        self._thread.join()

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                while not self._closing and max(self._failures.values()) < _MAX_FAILURES:
                    self._process_commands()
                    self._iterate()
        except Exception:  # a bug; the waiting requests must be failed
            logger.exception("the engine's thread failed")
        finally:
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._ended = True
        while not self._commands.empty():
            self._process(self._commands.get())
        refusal = self._stopped()
        self._fail_where(lambda _: True, refusal.code, refusal.message)
        while self._inspections:
            result, *_ = self._inspections.popleft()
            if result.set_running_or_notify_cancel():
                result.set_exception(self._stopped())

    def _stopped(self) -> EngineRefusal:
        if self._closing:
            return EngineRefusal("shutting_down", "This replica is shutting down; retry the request.")
        return EngineRefusal("engine_error", "The engine of this replica has failed; retry the request.")

    def _process_commands(self) -> None:
        idle = not self._waiting and not self._running and not self._inspections
        # An idle loop blocks until a command arrives.
        if idle:
            self._process(self._commands.get())
        while not self._commands.empty():
            self._process(self._commands.get())

    def _process(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:  # concerns one request; the others continue
            logger.exception("a command of the engine failed")

    def _iterate(self) -> None:
        now = time.perf_counter()
        self._fail_where(
            lambda state: state.deadline <= now, "deadline_exceeded", "The request was not finished by its deadline."
        )
        self._inspect_next()
        self._starting = self._next_requests()
        if self._starting:
            self._start(self._starting)
            self._starting = []
        if self._running:
            self._attempt("decode", list(self._running), self._step)

    def _inspect_next(self) -> None:
        """Computes one inspection: running requests must not wait for all of them."""
        while self._inspections:
            result, image, num_visual_tokens = self._inspections.popleft()
            if not result.set_running_or_notify_cancel():
                continue
            try:
                inspection = self._vision.inspect(image, num_visual_tokens)
            except Exception:  # as in `_attempt`
                logger.exception("an image could not be inspected")
                result.set_exception(EngineRefusal("engine_error", "The image cannot be inspected at this budget."))
            else:
                result.set_result(inspection)
            return

    def _attempt(self, stage: Stage, states: list[RequestState], work: Callable[[list[RequestState]], None]) -> None:
        """Runs a stage for some requests; if it fails, exactly these requests fail."""
        try:
            work(states)
        except Exception as error:  # the loop must survive a failed batch, whatever failed
            logger.exception("%s of %d requests failed", stage, len(states))
            too_large = stage == "prefill" and len(states) > 1 and isinstance(error, torch.OutOfMemoryError)
        else:
            self._failures[stage] = 0
            return
        # Not inside `except`: an exception being handled keeps everything in its frames in memory.
        if too_large:
            for half in (states[: len(states) // 2], states[len(states) // 2 :]):
                self._attempt(stage, half, work)
            return
        self._failures[stage] += 1
        for state in states:
            if not state.ended:
                self._fail(state, "engine_error", "The engine failed on this batch of requests; retry the request.")

    def _next_requests(self) -> list[RequestState]:
        """Takes the first requests of the queue that fit one iteration; in order, so that large ones do not starve."""
        states: list[RequestState] = []
        tokens = images = blocks = 0
        while self._waiting:
            state = self._waiting[0]
            tokens += self._prefill_tokens(state.request, state.request.smallest_budget)
            if state.images is None:
                images += sum(image.content not in self._vision.cache for image in state.request.images)
            blocks += self._decoder.pool.blocks_for(self._kv_lengths(state.request, state.request.smallest_budget))
            max_running = self._config.max_running + state.request.urgent
            if len(self._running) + len(states) >= max_running or blocks > self._free_blocks(state):
                break
            if states and (tokens > self._config.prefill_tokens or images > self._config.vision_batch):
                break
            states.append(self._waiting.popleft())
        return states

    def _prefill_tokens(self, request: GenerateRequest, budget: int) -> int:
        """Returns the number of prompt tokens that enter the decoder."""
        return request.tokens_at(self._decoder.prefill_per_image or budget).total

    def _kv_lengths(self, request: GenerateRequest, budget: int) -> list[int]:
        """Returns the maximum number of tokens in each layer; the last new token is never attended to."""
        num_text = len(request.prompt_ids) + request.sampling.max_new_tokens - 1
        return self._decoder.kv_lengths(num_text, len(request.images), budget)

    def _free_blocks(self, state: RequestState) -> int:
        pool = self._decoder.pool
        return pool.free_blocks if state.request.urgent else pool.free_blocks - pool.spare_blocks

    def _start(self, states: list[RequestState]) -> None:
        now = time.perf_counter()
        for state in states:
            state.started = now
        not_encoded = [state for state in states if state.request.images and state.images is None]
        if not_encoded:
            self._attempt("vision", not_encoded, self._encode)
        for state in states:
            if state.request.choices and not state.ended:
                self._choose_budget(state)
        for batch in by_length(self._admit([state for state in states if not state.ended])):
            self._attempt("prefill", batch, self._prefill)

    def _encode(self, states: list[RequestState]) -> None:
        encoded = self._vision.encode(image for state in states for image in state.request.images)
        for state in states:
            contents = [image.content for image in state.request.images]
            state.images = {content: encoded.images[content] for content in contents}
            state.cached_images = sum(content not in encoded.new for content in contents)
            state.vision_s = encoded.seconds if state.cached_images < len(contents) else 0.0

    def _choose_budget(self, state: RequestState) -> None:
        assert self._chooser is not None, "checked by `submit`"
        assert state.images is not None, "its images are encoded"
        features = {content: image.patch_features_ND for content, image in state.images.items()}
        try:
            state.request = self._chooser.choose(state.request, features, self.max_request_tokens)
        except Exception:  # as in `_attempt`
            logger.exception("no budget could be chosen")
            self._fail(
                state,
                "engine_error",
                "The engine could not choose a budget for this request; set visual_tokens to a number.",
            )

    def _admit(self, states: list[RequestState]) -> list[RequestState]:
        """Reserves memory for the first requests; the rest is queued again if the chosen budgets do not fit."""
        pool = self._decoder.pool
        tokens = 0
        for index, state in enumerate(states):
            budget = state.request.num_visual_tokens
            tokens += self._prefill_tokens(state.request, budget)
            needed = self._kv_lengths(state.request, budget)
            if pool.blocks_for(needed) > self._free_blocks(state) or (index and tokens > self._config.prefill_tokens):
                self._waiting.extendleft(reversed(states[index:]))
                states = states[:index]
                break
            state.blocks = pool.reserve(needed)
        self._running += states
        return states

    def _prefill(self, states: list[RequestState]) -> None:
        before = time.perf_counter()
        images = {content: each for state in states for content, each in (state.images or {}).items()}
        visual = self._vision.compress([state.request for state in states], images)
        logits_BV, spans = self._decoder.prefill(
            [
                Prompt(
                    state.request.prompt_ids,
                    state.request.visual_offset,
                    None if tokens is None else tokens.tokens_KL,
                    state.request.num_visual_tokens,
                    state.blocks,
                    None if tokens is None else tokens.patches,
                )
                for state, tokens in zip(states, visual, strict=True)
            ],
        )
        self._counts["prefill_batches"] += 1
        self._counts["prefilled"] += len(states)
        for state, own in zip(states, spans, strict=True):
            state.spans = own
            # The images are no longer needed: the visual tokens are in the KV pool.
            state.images = None
            state.first_token_at = time.perf_counter()
            state.prefill_s = state.first_token_at - before
        self._advance(states, logits_BV)

    def _step(self, states: list[RequestState]) -> None:
        logits_BV = self._decoder.decode(
            [state.last_token for state in states],
            [state.spans for state in states],
            [state.blocks for state in states],
        )
        self._counts["steps"] += 1
        self._counts["decoded_rows"] += len(states)
        self._advance(states, logits_BV)

    def _advance(self, states: list[RequestState], logits_BV: Tensor) -> None:
        """Adds the next token to each request, sends events, and removes finished requests.

        A failure in one row fails that request only.
        """
        tokens = self._choose_tokens(states, logits_BV)
        for state, token, logits_V in zip(states, tokens, logits_BV, strict=True):
            if state.ended:
                continue
            if token is None:
                logger.error("request %s has no next token: %s", state.request.request_id, NOT_FINITE)
                self._fail(state, "engine_error", NOT_FINITE)
                continue
            try:
                reason = self._writer.append(state, token, logits_V)
                if reason is not None:
                    self._remove(state)
                    self._writer.finish(state, reason, self.stats())
            except Exception:  # as in `_attempt`
                logger.exception("request %s has no next token", state.request.request_id)
                if not state.ended:
                    self._fail(state, "engine_error", _NO_TOKEN)

    def _choose_tokens(self, states: list[RequestState], logits_BV: Tensor) -> list[int | None]:
        try:
            return choose(
                logits_BV, [state.request.sampling for state in states], [state.generator for state in states]
            )
        except Exception:  # as in `_attempt`
            if len(states) == 1:
                logger.exception("no token could be chosen")
                self._fail(states[0], "engine_error", _NO_TOKEN)
                return [None]
        return [
            token
            for row, state in enumerate(states)
            for token in self._choose_tokens([state], logits_BV[row : row + 1])
        ]

    def _fail_where(self, selected: Callable[[RequestState], bool], code: str, message: str) -> None:
        for state in [each for each in itertools.chain(self._waiting, self._starting, self._running) if selected(each)]:
            if not state.ended:
                self._fail(state, code, message)

    def _fail(self, state: RequestState, code: str, message: str) -> None:
        self._remove(state)
        self._writer.fail(state, code, message)

    def _remove(self, state: RequestState) -> None:
        state.ended = True
        state.images = None
        state.spans = []
        for group in (self._waiting, self._running):
            if state in group:
                group.remove(state)
        self._decoder.pool.release(state.blocks)
        state.blocks = NO_BLOCKS
        with self._lock:
            self._in_flight -= 1
