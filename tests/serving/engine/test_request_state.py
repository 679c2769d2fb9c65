"""Tests of how an answer grows token by token, and of its incremental decoding."""

from typing import Any

import pytest
import torch

from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.engine import EngineStats, Event, Finished, GenerateRequest, Piece, Sampling
from parcelray.serving.engine.request_state import AnswerWriter, TextStream


class _Counting:
    """A tokenizer of single characters that counts how often it decodes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.calls = 0

    def decode(self, ids: list[int], **_: Any) -> str:
        self.calls += 1
        return "".join(self.text[each] for each in ids)


def test_text_that_is_not_streamed_is_decoded_once() -> None:
    tokenizer = _Counting(" some text ")
    stream = TextStream(tokenizer, live=False)
    assert [stream.push(token) for token in range(11)] == [""] * 11
    assert tokenizer.calls == 0
    assert stream.finish() == stream.text == "some text"
    assert tokenizer.calls == 1
    stopping = TextStream(_Counting(" some text "), ["te"], live=False)
    assert "".join(stopping.push(token) for token in range(8)) == "some"
    assert stopping.stopped


def test_a_stop_string_completed_at_the_end_sets_the_reason() -> None:
    # A character that may be incomplete is held back until the end.
    writer = AnswerWriter(_Counting("ab\N{REPLACEMENT CHARACTER}"), frozenset())
    ends: list[Event] = []
    sampling = Sampling(max_new_tokens=3, stop=("b\N{REPLACEMENT CHARACTER}",))
    state = writer.new_state(GenerateRequest("r", (1,), 0, (), 0, sampling, 1.0), ends.append)
    reasons = [writer.append(state, token, torch.zeros(3)) for token in range(3)]
    assert reasons == [None, None, "length"]
    writer.finish(state, "length", EngineStats())
    (end,) = ends
    assert isinstance(end, Finished)
    assert (end.text, end.reason) == ("a", "stop")


def test_a_stream_begins_with_the_first_token_even_without_text() -> None:
    writer = AnswerWriter(_Counting("\N{REPLACEMENT CHARACTER}bc"), frozenset())
    events: list[Event] = []
    state = writer.new_state(
        GenerateRequest("r", (1,), 0, (), 0, Sampling(max_new_tokens=4), 1.0, stream=True), events.append
    )
    writer.append(state, 0, torch.zeros(3))
    (first,) = events
    assert isinstance(first, Piece)
    assert first.text == ""
    assert state.num_new == 1


@pytest.mark.parametrize(
    "text", ["two words", "caf\u00e9 \u4f60\u597d", "  spaces   inside  ", "line\nline", "a", "1234567"]
)
def test_streamed_text_equals_the_decoded_text(processor: ElasticProcessor, text: str) -> None:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(processor.tokenizer)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == processor.tokenizer.decode(ids).strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_no_part_of_a_stop_string_is_sent(processor: ElasticProcessor) -> None:
    ids = processor.tokenizer("red green STOP blue", add_special_tokens=False)["input_ids"]
    stream = TextStream(processor.tokenizer, stop=["STOP"])
    sent = ""
    for token in ids:
        sent += stream.push(token)
        assert "ST" not in sent
        if stream.stopped:
            break
    assert stream.stopped
    assert sent + stream.finish() == "red green"
