"""Records every request, however it ended: a log record, trace attributes and, for a share of the answers, a sample.

The log never holds the text, the images or the API key. In Serve's log, which is JSON (`app.LOGGING`), a record is one
line with its fields below `request`.
"""

import logging
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from opentelemetry import trace

from parcelray.config.serve import SamplesConfig
from parcelray.serving.engine.engine import Finished, GenerateRequest

logger = logging.getLogger("parcelray.requests")
_NS = 1_000_000_000


class RequestSampler:
    """Draws a share of the answered requests and passes a record of each on.

    Args:
        config: the share, and whether texts are included.
        keep: stores a record and returns immediately.
        rng: random generator of the draws.
    """

    def __init__(
        self, config: SamplesConfig, keep: Callable[[Mapping[str, Any]], None], rng: random.Random | None = None
    ) -> None:
        self._config = config
        self._keep = keep
        self._rng = rng or random.Random()

    def answered(
        self,
        request: GenerateRequest,
        end: Finished,
        *,
        version: str,
        question: str,
        requested_budget: int | str,
        latency_s: float,
        first_token_s: float,
    ) -> None:
        """Keeps a sample of an answered request, if it is drawn; see `RequestLog.answered` for the arguments."""
        if self._rng.random() >= self._config.ratio:
            return
        timings = end.timings
        record: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request.request_id,
            "model_version": version,
            "asked": requested_budget,
            "visual_tokens": request.num_visual_tokens,
            "images": len(request.images),
            "prompt_tokens": request.num_prompt_tokens,
            "new_tokens": end.num_new_tokens,
            "finish_reason": end.reason,
            "latency_s": latency_s,
            "first_token_s": first_token_s,
            "queue_s": timings.queue_s,
            "vision_s": timings.vision_s,
            "prefill_s": timings.prefill_s,
            "decode_s": timings.total_s - timings.first_token_s,
        }
        if self._config.texts:
            record |= {
                "question": question,
                "answer": end.text,
                "image_sha256": [image.content for image in request.images],
            }
        self._keep(record)


class RequestLog:
    """Writes records to the logger `parcelray.requests`.

    Args:
        samples: draws requests of which a sample is kept; None: no samples.
    """

    def __init__(self, samples: RequestSampler | None = None) -> None:
        self._samples = samples

    def answered(
        self,
        request: GenerateRequest,
        end: Finished,
        *,
        owner: str | None,
        version: str,
        question: str,
        requested_budget: int | str,
        latency_s: float,
        first_token_s: float,
    ) -> None:
        """Records a request that was answered.

        Args:
            request: the request as the model got it.
            end: end of the answer.
            owner: name of the API key.
            version: version of the model.
            question: text of the request; only samples may include it.
            requested_budget: visual-token budget in the request: a number, `low`, `high` or `auto`.
            latency_s: from arrival at the endpoint to the end of the answer, seconds.
            first_token_s: from arrival at the endpoint to the first token, seconds.
        """
        self._write(
            "answered",
            request.request_id,
            owner=owner,
            model_version=version,
            visual_tokens=request.num_visual_tokens,
            images=len(request.images),
            cached_images=end.cached_images,
            prompt_tokens=request.num_prompt_tokens,
            new_tokens=end.num_new_tokens,
            finish_reason=end.reason,
            latency_ms=round(latency_s * 1000, 2),
            first_token_ms=round(end.timings.first_token_s * 1000, 2),
            queue_ms=round(end.timings.queue_s * 1000, 2),
            engine=end.stats.engine,
        )
        if self._samples is not None:
            self._samples.answered(
                request,
                end,
                version=version,
                question=question,
                requested_budget=requested_budget,
                latency_s=latency_s,
                first_token_s=first_token_s,
            )
        _annotate_trace(request, end, version)

    def refused(self, request_id: str, *, owner: str | None, status: int, code: str) -> None:
        """Records a request that got no answer, or whose stream broke off."""
        self._write("refused", request_id, owner=owner, status=status, code=code)

    def cancelled(self, request_id: str, *, owner: str | None) -> None:
        """Records a request whose client disconnected."""
        self._write("cancelled", request_id, owner=owner)

    def _write(self, event: str, request_id: str, **fields: Any) -> None:
        logger.info("request %s", event, extra={"request": {"event": event, "id": request_id, **fields}})


def _annotate_trace(request: GenerateRequest, end: Finished, version: str) -> None:
    """Adds a request's attributes, and one span per stage of the engine, to the current span.

    Serve itself creates the spans of proxy, ingress and replica, if the job configures `traces`. Without tracing, the
    current span does not record, and nothing is added.
    """
    span = trace.get_current_span()
    if not span.is_recording():
        return
    span.set_attributes(
        {
            "parcel.request_id": request.request_id,
            "parcel.model_version": version,
            "parcel.visual_tokens": request.num_visual_tokens,
            "parcel.images": len(request.images),
            "parcel.cached_images": end.cached_images,
            "parcel.prompt_tokens": request.num_prompt_tokens,
            "parcel.new_tokens": end.num_new_tokens,
            "parcel.finish_reason": end.reason,
        }
    )
    timings = end.timings
    tracer = trace.get_tracer("parcelray")
    arrived = time.time() - timings.total_s
    parts = {
        "queue": (0.0, timings.queue_s),
        "prefill": (timings.first_token_s - timings.prefill_s, timings.first_token_s),
    }
    if timings.vision_s:
        parts["vision"] = (timings.queue_s, timings.queue_s + timings.vision_s)
    parts["decode"] = (timings.first_token_s, timings.total_s)
    for name, (start, stop) in parts.items():
        tracer.start_span(name, start_time=int((arrived + start) * _NS)).end(int((arrived + stop) * _NS))
