"""One JSON line for each request that was answered or refused: who, what budget, how long, how it ended. Never the text, the image or the key."""

import json
import logging
from typing import Any

from parcelray.serving.engine import Finished, GenerateRequest
from parcelray.serving.request_samples import RequestSampler

logger = logging.getLogger("parcelray.requests")


class RequestLog:
    """Writes records to the logger `parcelray.requests`.

    Args:
        samples: draws requests of which more is kept; None: of none.
    """

    def __init__(self, samples: RequestSampler | None = None) -> None:
        self.samples = samples

    def answered(self, request: GenerateRequest, end: Finished, *, version: str, latency_s: float) -> None:
        """A request got its answer."""
        self._write(
            event="answered",
            request_id=request.request_id,
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

    def refused(self, request_id: str, *, status: int, code: str) -> None:
        """A request got none."""
        self._write(event="refused", request_id=request_id, status=status, code=code)

    def _write(self, **fields: Any) -> None:
        logger.info("%s", json.dumps(fields, separators=(",", ":")))
