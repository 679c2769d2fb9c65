"""Which answered requests are kept as samples, and what of them."""

import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from parcelray.config.serve import SamplesConfig
from parcelray.serving.engine.engine import Finished, GenerateRequest


class RequestSampler:
    """Draws requests and hands their records on.

    Args:
        config: how many, and whether with texts.
        keep: takes a record and returns at once.
        rng: draws.
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
        question: str,
        asked: int | str,
        version: str,
        latency_s: float,
        first_token_s: float,
    ) -> None:
        """A request got its answer.

        Args:
            request: as the model had it.
            end: of the answer.
            question: the request's text.
            asked: the budget that it asked for.
            version: of the model.
            latency_s: from arrival to the end of the answer.
            first_token_s: from arrival to the first token.
        """
        if self._rng.random() >= self._config.ratio:
            return
        timings = end.timings
        record: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request.request_id,
            "model_version": version,
            "asked": asked,
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
