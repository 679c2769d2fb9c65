"""What a request's trace says of it, where Serve records traces (`traces` of the job): the budget, and where the time went.

Serve itself makes the spans of proxy, ingress and replica. Without tracing the current span records nothing, and
neither does this.
"""

import time

from opentelemetry import trace

from parcelray.serving.engine.engine import Finished, GenerateRequest

_NS = 1_000_000_000


def annotate(request: GenerateRequest, end: Finished, *, version: str) -> None:
    """Adds a finished request's attributes, and a span for each part of its time in the engine, to the current span."""
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
