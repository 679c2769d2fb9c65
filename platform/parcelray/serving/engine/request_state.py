"""The state of one request inside an engine, and how its answer grows token by token."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parcelray.serving.engine.decoder import Span
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
from parcelray.serving.engine.kv_pool import NO_BLOCKS, Blocks
from parcelray.serving.engine.sampling import generator_of, logprobs_of
from parcelray.serving.engine.vision import EncodedImage

logger = logging.getLogger(__name__)
_MAX_PADDING = 0.25
"""Maximum share of padding in a prefill batch; shorter prompts go into another batch."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(eq=False)
class RequestState:
    """A request in an engine: its memory, its generated tokens, and its times."""

    request: GenerateRequest
    """The request; once its budget is chosen, with that budget."""
    listener: Listener
    arrived: float
    """Time of arrival, by `time.perf_counter`."""
    text: "TextStream"
    generator: torch.Generator | None
    images: dict[str, EncodedImage] | None = None
    """Its encoded images by content, held from the vision tower to the prefill."""
    cached_images: int = 0
    vision_s: float = 0.0
    blocks: Blocks = field(default_factory=lambda: NO_BLOCKS)
    """Blocks of the KV pool that it owns."""
    spans: list[Span] = field(default_factory=list)
    """Its tokens in the KV pool, by layer."""
    last_token: int = 0
    num_new: int = 0
    started: float = 0.0
    prefill_s: float = 0.0
    first_token_at: float = 0.0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    unsent: list[TokenLogprob] = field(default_factory=list)
    unsent_text: str = ""
    ended: bool = False
    """Whether its listener got its last event."""

    @property
    def deadline(self) -> float:
        """Time at which the request is aborted, by the clock of `arrived`."""
        return self.arrived + self.request.timeout_s

    def send(self, event: Event) -> None:
        """Passes an event to the listener; its failure must not end the engine's thread."""
        try:
            self.listener(event)
        except Exception:  # any failure of the listener
            logger.exception("request %s: its listener failed", self.request.request_id)


class AnswerWriter:
    """Extends answers token by token and sends their events.

    Args:
        tokenizer: tokenizer of the model.
        end_ids: ids of the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids

    def new_state(self, request: GenerateRequest, listener: Listener) -> RequestState:
        """Returns the state of a request that has just arrived."""
        text = TextStream(self._tokenizer, request.sampling.stop, live=request.stream)
        return RequestState(request, listener, time.perf_counter(), text, generator_of(request.sampling))

    def append(self, state: RequestState, token: int, logits_V: Tensor) -> FinishReason | None:
        """Adds a token to an answer and sends new text to the listener.

        Returns:
            The reason why the answer ends here, or None if it continues.
        """
        sampling = state.request.sampling
        state.last_token = token
        state.num_new += 1
        if token in self._end_ids:
            return "stop"
        if sampling.logprobs is not None:
            state.unsent.append(self._logprob(logits_V, token, sampling.logprobs))
        state.unsent_text = state.text.push(token)
        if state.text.stopped:
            return "stop"
        if state.num_new == sampling.max_new_tokens:
            return "length"
        # The first token is reported at once, even if it is not yet a whole character.
        if state.request.stream and (state.unsent_text or state.num_new == 1):
            self._send_piece(state)
        return None

    def finish(self, state: RequestState, reason: FinishReason, stats: EngineStats) -> None:
        """Sends the remaining text and the end; `stats` are those of the engine without this request."""
        state.unsent_text += state.text.finish()
        # A stop string may be completed by the last characters, which were held back as incomplete.
        reason = "stop" if state.text.stopped else reason
        if state.request.stream and (state.unsent_text or state.unsent):
            self._send_piece(state)
        timings = Timings(
            queue_s=state.started - state.arrived,
            vision_s=state.vision_s,
            prefill_s=state.prefill_s,
            first_token_s=state.first_token_at - state.arrived,
            total_s=time.perf_counter() - state.arrived,
        )
        state.send(
            Finished(
                state.text.text,
                reason,
                state.num_new,
                timings,
                state.cached_images,
                (*state.logprobs, *state.unsent),
                stats,
                state.request.num_visual_tokens,
            )
        )

    def fail(self, state: RequestState, code: str, message: str) -> None:
        """Sends the end of a request that gets no answer."""
        state.send(Failed(EngineRefusal(code, message)))

    def _send_piece(self, state: RequestState) -> None:
        state.send(Piece(state.unsent_text, tuple(state.unsent), state.request.num_visual_tokens))
        state.logprobs += state.unsent
        state.unsent.clear()
        state.unsent_text = ""

    def _logprob(self, logits_V: Tensor, token: int, top: int) -> TokenLogprob:
        values = logprobs_of(logits_V, token, top)
        best = tuple((self._decode(each), value) for each, value in zip(values.ids, values.logprobs, strict=True))
        return TokenLogprob(self._decode(token), values.logprob, best)

    def _decode(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


class TextStream:
    """Decodes an answer incrementally: whole characters only, without stop strings and without outer white space.

    `tokenizers.decoders.DecodeStream` is not used. It cannot flush the end of a text, and it raises an
    exception when byte tokens do not form a character. Sampling from a vocabulary with byte fallback (Gemma, Llama) can
    produce such tokens.

    Args:
        tokenizer: tokenizer of the model.
        stop: strings that end the answer and are not part of it.
        live: whether text is needed before the end. If not, and without stop strings, `finish` decodes everything once.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, live: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._live = live or bool(stop)
        self._ids: list[int] = []
        # Tokens before `_read` are in `_text`. Tokens from `_context` on are decoded again together with the next one,
        # because a tokenizer may decode a token differently at the start of a text.
        self._context = 0
        self._read = 0
        self._text = ""
        self._sent = 0
        self.stopped = False
        """Whether a stop string has been generated."""

    @property
    def text(self) -> str:
        """All text sent so far."""
        return self._text[: self._sent].strip()

    def push(self, token_id: int) -> str:
        """Adds a token and returns the new text that can no longer change."""
        self._ids.append(token_id)
        if not self._live:
            return ""
        self._decode_new(final=False)
        return self._release(final=False)

    def finish(self) -> str:
        """Returns the remaining text at the end of the answer."""
        if not self.stopped:
            self._decode_new(final=True)
        return self._release(final=True)

    def _decode_new(self, *, final: bool) -> None:
        before = self._decode(self._ids[self._context : self._read])
        after = self._decode(self._ids[self._context :])
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not final):
            return
        self._text += after[len(before) :]
        self._context, self._read = self._read, len(self._ids)
        ends = [end for end in (self._text.find(stop, self._sent) for stop in self._stop) if end >= 0]
        if ends:
            self._text = self._text[: min(ends)]
            self.stopped = True

    def _release(self, *, final: bool) -> str:
        end = len(self._text) if final or self.stopped else self._certain_length()
        piece = self._text[self._sent : end]
        if self._sent == 0 or not self._text[: self._sent].strip():
            piece = piece.lstrip()
        self._sent = end
        return piece.rstrip() if final or self.stopped else piece

    def _certain_length(self) -> int:
        """Number of characters before a possible stop string and before white space that may be trailing."""
        held = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text) - self._sent), held, -1):
                if self._text.endswith(stop[:length]):
                    held = length
                    break
        return max(self._sent, len(self._text[: len(self._text) - held].rstrip()))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


def by_length(states: Iterable[RequestState]) -> Iterator[list[RequestState]]:
    """Yields batches of requests with similar prompt length, to bound the share of padding."""
    batch: list[RequestState] = []
    for state in sorted(states, key=lambda state: state.request.num_prompt_tokens):
        longest = state.request.num_prompt_tokens
        used = sum(each.request.num_prompt_tokens for each in batch) + longest
        if batch and used < (1 - _MAX_PADDING) * longest * (len(batch) + 1):
            yield batch
            batch = []
        batch.append(state)
    if batch:
        yield batch
