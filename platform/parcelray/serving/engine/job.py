"""A request on its way through an engine: what it has so far, who listens, and how its answer grows by a token."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.engine import (
    EngineRefusal,
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Listener,
    Piece,
    Timings,
    TokenLogprob,
)
from parcelray.serving.engine.sampling import generator_of, logprobs_of
from parcelray.serving.engine.text_stream import TextStream

logger = logging.getLogger(__name__)
_PADDING = 0.25
"""Of a prefill batch's area, at most; longer and shorter prompts then go into another batch."""


@dataclass(eq=False)
class Job:
    """A request on its way."""

    request: GenerateRequest
    """Once its budget is chosen, with that budget."""
    listener: Listener
    arrived: float
    text: TextStream
    generator: torch.Generator | None
    features: dict[str, Tensor] | None = None
    """Patch features of its images by content, from the vision tower to the prefill."""
    cached_images: int = 0
    vision_s: float = 0.0
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    """Its tokens in the pool."""
    last_token: int = 0
    num_new: int = 0
    started: float = 0.0
    prefill_s: float = 0.0
    first_token_at: float = 0.0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    unsent: list[TokenLogprob] = field(default_factory=list)
    unsent_text: str = ""
    ended: bool = False
    """Whether its listener has its end."""

    @property
    def most_tokens(self) -> int:
        """The pool's tokens that it may ever hold: the last new token is never attended to."""
        return self.request.num_prompt_tokens + self.request.sampling.max_new_tokens - 1

    @property
    def least_tokens(self) -> int:
        """The same at the smallest budget that it may get."""
        return self.request.least_prompt_tokens + self.request.sampling.max_new_tokens - 1

    @property
    def expires(self) -> float:
        """When it is given up, by the clock of `arrived`."""
        return self.arrived + self.request.timeout_s

    def tell(self, event: Event) -> None:
        """Hands an event to the listener, whose failure must not end the thread that answers everyone."""
        try:
            self.listener(event)
        except Exception:  # whatever it is
            logger.exception("a listener of the engine failed")


class AnswerWriter:
    """Writes answers token by token.

    Args:
        tokenizer: of the model.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids

    def job(self, request: GenerateRequest, listener: Listener) -> Job:
        """A request that has just arrived."""
        text = TextStream(self._tokenizer, request.sampling.stop, live=request.stream)
        return Job(request, listener, time.perf_counter(), text, generator_of(request.sampling))

    def append(self, job: Job, token: int, logits_V: Tensor) -> FinishReason | None:
        """Adds a token and tells who listens.

        Returns:
            Why the answer ends here; None: it goes on.
        """
        sampling = job.request.sampling
        job.last_token = token
        job.num_new += 1
        if token in self._end_ids:
            return "stop"
        if sampling.logprobs is not None:
            job.unsent.append(self._logprob(logits_V, token, sampling.logprobs))
        job.unsent_text = job.text.push(token)
        if job.text.stopped:
            return "stop"
        if job.num_new == sampling.max_new_tokens:
            return "length"
        # Who listens learns of the first token at once, also where it is not yet a whole character.
        if job.request.stream and (job.unsent_text or job.num_new == 1):
            self._send(job)
        return None

    def finish(self, job: Job, reason: FinishReason, stats: EngineStats) -> None:
        """Tells the rest and the end; `stats` are those of the engine without it."""
        job.unsent_text += job.text.finish()
        # A stop text may have come with the last characters, which were held back as incomplete.
        reason = "stop" if job.text.stopped else reason
        if job.request.stream and (job.unsent_text or job.unsent):
            self._send(job)
        timings = Timings(
            queue_s=job.started - job.arrived,
            vision_s=job.vision_s,
            prefill_s=job.prefill_s,
            first_token_s=job.first_token_at - job.arrived,
            total_s=time.perf_counter() - job.arrived,
        )
        logprobs = (*job.logprobs, *job.unsent)
        job.tell(
            Finished(
                job.text.text,
                reason,
                job.num_new,
                timings,
                job.cached_images,
                logprobs,
                stats,
                job.request.num_visual_tokens,
            )
        )

    def fail(self, job: Job, code: str, message: str) -> None:
        """Tells the end of a request that gets no answer."""
        job.tell(Failed(EngineRefusal(code, message)))

    def _send(self, job: Job) -> None:
        job.tell(Piece(job.unsent_text, tuple(job.unsent), job.request.num_visual_tokens))
        job.logprobs += job.unsent
        job.unsent.clear()
        job.unsent_text = ""

    def _logprob(self, logits_V: Tensor, token: int, top: int) -> TokenLogprob:
        found = logprobs_of(logits_V, token, top)
        best = tuple((self._text_of(each), value) for each, value in zip(found.ids, found.logprobs, strict=True))
        return TokenLogprob(self._text_of(token), found.logprob, best)

    def _text_of(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


def end_ids(model: ElasticVLM, processor: ElasticProcessor) -> frozenset[int]:
    """Tokens that end an answer, as `generate` reads them off the checkpoint."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in (*listed, processor.tokenizer.eos_token_id) if token is not None)


def by_length(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Batches of similar prompt length, so that little of them is padding."""
    batch: list[Job] = []
    for job in sorted(jobs, key=lambda job: job.request.num_prompt_tokens):
        longest = job.request.num_prompt_tokens
        used = sum(each.request.num_prompt_tokens for each in batch) + longest
        if batch and used < (1 - _PADDING) * longest * (len(batch) + 1):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch
