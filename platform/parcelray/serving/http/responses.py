"""Response bodies and headers in OpenAI's format, with the visual-token budget that was used."""

import json
from collections.abc import Sequence
from typing import Any

from parcelray.serving.engine.engine import Finished, Piece, TokenLogprob
from parcelray.serving.ingress.chat import Prepared


def headers(prepared: Prepared) -> dict[str, str]:
    """Returns the headers of every answer."""
    return {
        "x-visual-tokens": str(prepared.request.num_visual_tokens),
        "x-model-version": prepared.route.version,
    }


def server_timing(end: Finished) -> str:
    """Returns the value of the header Server-Timing: the time of each stage in milliseconds."""
    timings = end.timings
    parts = {
        "queue": timings.queue_s,
        "vision": timings.vision_s,
        "prefill": timings.prefill_s,
        "first_token": timings.first_token_s,
        "total": timings.total_s,
    }
    return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in parts.items())


def completion(prepared: Prepared, end: Finished, *, model: str, created: int) -> dict[str, Any]:
    """Returns the body of an answer without streaming."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": end.text},
        "finish_reason": end.reason,
        "logprobs": _logprobs(prepared, end.logprobs),
    }
    return {**_head(prepared, "chat.completion", model, created), "choices": [choice], "usage": _usage(prepared, end)}


def opening_chunk(prepared: Prepared, *, model: str, created: int) -> bytes:
    """Returns the first event of a stream, which has the role of the assistant and no text."""
    return _chunk(prepared, model, created, {"role": "assistant", "content": ""}, None, None)


def chunk(prepared: Prepared, event: Piece | Finished, *, model: str, created: int) -> bytes:
    """Returns one event of a stream: a piece of text, or the finish reason."""
    if isinstance(event, Finished):
        return _chunk(prepared, model, created, {}, event.reason, None)
    return _chunk(prepared, model, created, {"content": event.text}, None, _logprobs(prepared, event.logprobs))


def usage_chunk(prepared: Prepared, end: Finished, *, model: str, created: int) -> bytes:
    """Returns the event of a stream that has the token usage."""
    return sse(
        {**_head(prepared, "chat.completion.chunk", model, created), "choices": [], "usage": _usage(prepared, end)}
    )


def sse(data: dict[str, Any]) -> bytes:
    """Encodes one server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def _chunk(
    prepared: Prepared,
    model: str,
    created: int,
    delta: dict[str, str],
    reason: str | None,
    logprobs: dict[str, Any] | None,
) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
    return sse({**_head(prepared, "chat.completion.chunk", model, created), "choices": [choice]})


def _head(prepared: Prepared, kind: str, model: str, created: int) -> dict[str, Any]:
    return {
        "id": prepared.request.request_id,
        "object": kind,
        "created": created,
        "model": model,
        "system_fingerprint": prepared.route.version,
    }


def _usage(prepared: Prepared, end: Finished) -> dict[str, Any]:
    tokens = prepared.request.tokens
    return {
        "prompt_tokens": tokens.total,
        "completion_tokens": end.num_new_tokens,
        "total_tokens": tokens.total + end.num_new_tokens,
        "prompt_tokens_details": {"image_tokens": tokens.visual, "cached_tokens": 0},
        "visual_tokens": prepared.request.num_visual_tokens,
    }


def _logprobs(prepared: Prepared, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if prepared.request.sampling.logprobs is None:
        return None
    content = [
        {**_token(each.token, each.logprob), "top_logprobs": [_token(*pair) for pair in each.top]} for each in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
