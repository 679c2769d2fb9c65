"""The plain engine: transformers' `generate` over one batch of requests with equal budgets after the other.

A batch ends with its longest answer, and nobody joins it before, not even a health check: a job with this engine keeps
`limits.max_tokens` small. A model whose decoder the pooled one cannot run is served with it.

Shapes: B requests of the batch, S tokens of the longest prompt, V vocabulary.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.budget_chooser import BudgetChooser
from parcelray.serving.engine.continuous_engine import EngineLimits
from parcelray.serving.engine.engine import (
    EngineRefusal,
    EngineStats,
    GenerateRequest,
    ImagePixels,
    Inspection,
    Listener,
    check_request,
)
from parcelray.serving.engine.job import AnswerWriter, Job, end_ids
from parcelray.serving.engine.sampling import choose
from parcelray.serving.engine.vision import VisionStage

logger = logging.getLogger(__name__)
_CLOSING = "This replica is shutting down; send the request again."


class StaticEngine:
    """See the module's docstring; implements `parcelray.serving.engine.engine.Engine`.

    Args:
        model: in evaluation mode, on its device.
        processor: of the same checkpoint.
        limits: of a batch and of the queue.
        name: in its statistics.
        chooser: of budgets that requests leave open; None: such requests are refused.
    """

    def __init__(
        self,
        model: ElasticVLM,
        processor: ElasticProcessor,
        limits: EngineLimits,
        *,
        name: str = "local",
        chooser: BudgetChooser | None = None,
    ) -> None:
        self._model = model
        self._processor = processor
        self._limits = limits
        self._name = name
        self._chooser = chooser
        self._writer = AnswerWriter(processor.tokenizer, end_ids(model, processor))
        self._vision = VisionStage(
            model, processor, cache_bytes=limits.feature_cache_bytes, batch_size=limits.vision_batch
        )
        self.supported_budgets = tuple(model.supported_budgets)
        self.max_request_tokens = min(int(model.config.text_config.max_position_embeddings), limits.kv_tokens)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._batch: list[Job] = []
        self._in_flight = 0
        self._steps = 0
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="parcelray-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """See `Engine`."""
        check_request(request, self.max_request_tokens, self.supported_budgets, chooses=self._chooser is not None)
        job = self._writer.job(request, listener)
        with self._lock:
            if self._closing:
                raise EngineRefusal("shutting_down", _CLOSING)
            if self._in_flight >= self._limits.max_running + self._limits.max_waiting and not request.urgent:
                raise EngineRefusal(
                    "queue_full", f"{self._in_flight} requests are in flight already; send the request again later."
                )
            self._in_flight += 1
            self._commands.put(lambda: self._waiting.appendleft(job) if request.urgent else self._waiting.append(job))

    def cancel(self, request_id: str) -> None:
        """See `Engine`."""
        self._commands.put(
            lambda: self._fail(
                [job for job in self._all() if job.request.request_id == request_id],
                "cancelled",
                "The request was cancelled.",
            )
        )

    def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Future[Inspection]:
        """See `Engine`."""
        found: Future[Inspection] = Future()

        def look() -> None:
            if not found.set_running_or_notify_cancel():
                return
            try:
                found.set_result(self._vision.inspect(image, num_visual_tokens))
            except Exception:  # whatever it is, who waits must hear of it
                logger.exception("an image could not be inspected")
                found.set_exception(EngineRefusal("engine_error", "The image cannot be inspected at this budget."))

        with self._lock:
            if self._closing:
                found.set_exception(EngineRefusal("shutting_down", _CLOSING))
            else:
                self._commands.put(look)
        return found

    def stats(self) -> EngineStats:
        """See `Engine`.

        Without a pool, the cache of a batch is what its longest request makes of it: no memory is reserved.
        """
        cache, running = self._vision.cache, len(self._batch)
        return EngineStats(
            engine=self._name,
            running=running,
            waiting=max(0, self._in_flight - running),
            kv_tokens_total=self._limits.kv_tokens,
            feature_cache_hits=cache.hits,
            feature_cache_misses=cache.misses,
            feature_cache_bytes=cache.bytes,
            steps=self._steps,
        )

    def close(self) -> None:
        """See `Engine`."""
        with self._lock:
            self._closing = True
        self._commands.put(lambda: self._fail(self._all(), "shutting_down", _CLOSING))
        self._thread.join()

    def _all(self) -> list[Job]:
        return [*self._waiting, *self._batch]

    def _loop(self) -> None:
        with torch.inference_mode():
            while not (self._closing and self._commands.empty()):
                self._take_commands(wait=not self._waiting)
                self._batch = self._next_batch()
                try:
                    if self._batch:
                        self._answer(self._batch)
                except Exception:  # the loop must outlive a failed batch, whatever failed in it
                    logger.exception("a batch of %d requests failed", len(self._batch))
                    self._fail(
                        self._batch,
                        "engine_error",
                        "The engine failed on this batch of requests; send the request again.",
                    )
                self._batch = []

    def _take_commands(self, *, wait: bool) -> None:
        while wait or not self._commands.empty():
            self._commands.get()()
            wait = False

    def _next_batch(self) -> list[Job]:
        """The first request and those in the queue that `generate` can take with it."""
        if not self._waiting:
            return []
        near = list(self._waiting)[: self._limits.max_running]
        for job in near:
            if job.request.choices:
                self._choose_budget(job)
        near = [job for job in near if not job.ended]
        if not near:
            return []
        alike = [job for job in near if _kind(job) == _kind(near[0])]
        longest = max(job.request.num_prompt_tokens + job.request.sampling.max_new_tokens for job in alike)
        batch = alike[: max(1, self._limits.kv_tokens // longest)]
        for job in batch:
            self._waiting.remove(job)
        return batch

    def _choose_budget(self, job: Job) -> None:
        assert self._chooser is not None, "checked at its arrival"
        try:
            job.request = self._chooser.settled(
                job.request, self._vision.encode(job.request.images).features, self.max_request_tokens
            )
        except Exception:  # as in `_loop`
            logger.exception("no budget could be chosen")
            self._fail([job], "engine_error", "The engine could not choose a budget for this request; name one.")

    def _answer(self, batch: list[Job]) -> None:
        started = time.perf_counter()
        encoded = self._vision.encode(image for job in batch for image in job.request.images)
        visual = self._vision.compress([job.request for job in batch], encoded.features)
        seen = time.perf_counter()
        for job in batch:
            job.started = started
            job.cached_images = sum(image.content not in encoded.new for image in job.request.images)
            job.vision_s = encoded.seconds

        def next_tokens(input_ids: Tensor, logits_BV: Tensor) -> Tensor:
            """Leaves `generate` no choice but the tokens that each request's own sampling gives."""
            self._steps += 1
            self._take_commands(wait=False)
            now = time.perf_counter()
            self._fail(
                [job for job in self._all() if job.expires <= now],
                "deadline_exceeded",
                "The request was not finished by its deadline.",
            )
            tokens = choose(
                logits_BV.float(), [job.request.sampling for job in batch], [job.generator for job in batch]
            )
            for job, token, logits_V in zip(batch, tokens, logits_BV.float(), strict=True):
                if not job.ended:
                    self._append(job, token, logits_V, seen)
            forced_BV = torch.full_like(logits_BV, -torch.inf)
            return forced_BV.scatter_(
                1, torch.tensor([token or 0 for token in tokens], device=logits_BV.device)[:, None], 0.0
            )

        def ended(input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
            return torch.tensor([job.ended for job in batch], device=input_ids.device)

        self._model.generate(
            **self._inputs([job.request for job in batch], visual),
            max_new_tokens=max(job.request.sampling.max_new_tokens for job in batch),
            do_sample=False,
            # What ends an answer is decided above; no token has this id.
            eos_token_id=-1,
            logits_processor=LogitsProcessorList([next_tokens]),
            stopping_criteria=StoppingCriteriaList([ended]),
        )

    def _append(self, job: Job, token: int | None, logits_V: Tensor, seen: float) -> None:
        if job.num_new == 0:
            job.first_token_at = time.perf_counter()
            job.prefill_s = job.first_token_at - seen
        if token is None:
            self._fail([job], "engine_error", "The model gave no next token for this request.")
        elif (reason := self._writer.append(job, token, logits_V)) is not None:
            self._let_go(job)
            self._writer.finish(job, reason, self.stats())

    def _inputs(self, requests: list[GenerateRequest], visual: list[Tensor | None]) -> dict[str, Tensor]:
        """What `generate` reads: prompts with placeholders, padded on the left, and the tokens that stand for them."""
        length = max(request.num_prompt_tokens for request in requests)
        ids_BS = torch.full((len(requests), length), int(self._processor.tokenizer.pad_token_id))
        mask_BS = torch.zeros_like(ids_BS)
        for row, request in enumerate(requests):
            at = request.visual_offset
            placeholders = [self._processor.image_token_id] * request.num_image_tokens
            ids_BS[row, length - request.num_prompt_tokens :] = torch.tensor(
                [*request.prompt_ids[:at], *placeholders, *request.prompt_ids[at:]]
            )
            mask_BS[row, length - request.num_prompt_tokens :] = 1
        device = self._model.lm_head.weight.device
        inputs = {
            "input_ids": ids_BS.to(device),
            "attention_mask": mask_BS.to(device),
            "token_type_ids": torch.zeros_like(ids_BS).to(device),
        }
        tokens = [each for each in visual if each is not None]
        if tokens:
            width = requests[0].num_visual_tokens
            inputs |= self._model.image_inputs(torch.cat(tokens).view(-1, width, tokens[0].shape[1]))
        return inputs

    def _fail(self, jobs: list[Job], code: str, message: str) -> None:
        for job in jobs:
            if not job.ended:
                self._let_go(job)
                self._writer.fail(job, code, message)

    def _let_go(self, job: Job) -> None:
        job.ended = True
        if job in self._waiting:
            self._waiting.remove(job)
        with self._lock:
            self._in_flight -= 1


def _kind(job: Job) -> tuple[int, int]:
    """Requests of one kind go into one batch."""
    return job.request.num_visual_tokens, len(job.request.images)
