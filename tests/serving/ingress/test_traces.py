"""Tests of the trace attributes and spans of a request."""

import asyncio
import time

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from parcelray.datasets.sample import Sample
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.http.schemas import parse_chat
from parcelray.serving.ingress.chat import Prepared
from parcelray.serving.ingress.clients import LocalClient
from tests.serving.conftest import Asker
from tests.serving.local import VERSION, job_of, service_of


def test_a_trace_holds_the_budget_and_the_stages(
    model: ElasticVLM,
    processor: ElasticProcessor,
    engine: ContinuousEngine,
    samples: list[Sample],
    ask: Asker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    service = service_of(job_of(), model, processor, LocalClient(engine))
    chat = parse_chat(b'{"model": "mini", "messages": [{"role": "user", "content": "what"}]}', (64,))
    prepared = Prepared(chat, ask(samples[0], 64), service.routes.champion, time.perf_counter(), 0.0)
    asyncio.run(service.answer(prepared))
    assert exporter.get_finished_spans() == ()
    with provider.get_tracer("test").start_as_current_span("request"):
        asyncio.run(service.answer(prepared))
    *parts, whole = exporter.get_finished_spans()
    assert whole.attributes is not None
    assert (whole.attributes["parcel.visual_tokens"], whole.attributes["parcel.model_version"]) == (64, VERSION)
    # The second request finds its image in the cache, so there is no span of the vision tower.
    assert [part.name for part in parts] == ["queue", "prefill", "decode"]
    assert all(part.parent is not None and part.parent.span_id == whole.context.span_id for part in parts)
    assert all((part.start_time or 0) <= (part.end_time or 0) for part in parts)
