"""One record for each request, however it ended: who, what budget, how long. Never the text, the image or the key.

In Serve's log, which is JSON (`app.LOGGING`), a record is one line with the fields below `request`.
"""

import logging
from typing import Any

from parcelray.serving.engine.engine import Finished, GenerateRequest
from parcelray.serving.ingress.request_samples import RequestSampler

logger = logging.getLogger("parcelray.requests")


class RequestLog:
    """Writes records to the logger `parcelray.requests`.

    Args:
        samples: draws requests of which more is kept; None: of none.
    """

    def __init__(self, samples: RequestSampler | None = None) -> None:
        self.samples = samples

    def answered(
        self, request: GenerateRequest, end: Finished, *, owner: str | None, version: str, latency_s: float
    ) -> None:
        """A request got its answer."""
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

    def refused(self, request_id: str, *, owner: str | None, status: int, code: str) -> None:
        """A request got none, or its stream ended in the middle."""
        self._write("refused", request_id, owner=owner, status=status, code=code)

    def cancelled(self, request_id: str, *, owner: str | None) -> None:
        """The client hung up."""
        self._write("cancelled", request_id, owner=owner)

    def _write(self, event: str, request_id: str, **fields: Any) -> None:
        logger.info("request %s", event, extra={"request": {"event": event, "id": request_id, **fields}})
