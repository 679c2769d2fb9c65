"""Tests of failures inside the engine and of its health check."""

import asyncio
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from parcelray.config.serve import EngineConfig
from parcelray.datasets.sample import Sample
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine import continuous_engine, sampling
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.decoder import Prompt, Span
from parcelray.serving.engine.engine import (
    EngineRefusal,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    ImagePixels,
    PromptBuilder,
    Sampling,
    answer_all,
)
from parcelray.serving.engine.vision import Encoded
from parcelray.serving.replica.load import HealthProbe
from tests.serving.conftest import Asker
from tests.serving.local import PATIENCE_S, held

pytestmark = pytest.mark.usefixtures("never_ending")


class Running:
    """An engine with one long request in progress, whose events are collected."""

    def __init__(self, engine: ContinuousEngine, request: GenerateRequest) -> None:
        self.engine = engine
        self.inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._request = request
        engine.submit(request, self.inbox.put)
        self.inbox.get(timeout=PATIENCE_S)

    def continues(self) -> bool:
        """Whether the request produces another piece after the collected ones."""
        while not self.inbox.empty():
            assert not isinstance(self.inbox.get(), Failed | Finished)
        return not isinstance(self.inbox.get(timeout=PATIENCE_S), Failed | Finished)


@pytest.fixture
def running(model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample], ask: Asker) -> Iterator[Running]:
    engine = ContinuousEngine(model, processor, EngineConfig(max_running=8, kv_tokens=16384))
    yield Running(engine, ask(samples[0], 0, stream=True, max_new_tokens=8000, temperature=1.0, seed=0))
    engine.close()


def code_of(engine: ContinuousEngine, request: GenerateRequest) -> str:
    with pytest.raises(EngineRefusal) as refusal:
        answer_all(engine, [request])
    return refusal.value.code


def test_a_tiny_temperature_is_greedy_and_does_not_affect_others(
    running: Running, samples: list[Sample], ask: Asker
) -> None:
    cold = [ask(samples[1], 16, temperature=temperature, seed=1) for temperature in (1e-50, 1e-40, 1e-6, 0.0)]
    assert len({each.text for each in answer_all(running.engine, cold)}) == 1
    assert answer_all(running.engine, [ask(samples[1], 16, temperature=1e-5, top_p=0.5, seed=1)])[0].num_new_tokens == 8
    assert running.continues()


def test_a_row_without_a_token_fails_only_its_request(
    running: Running, samples: list[Sample], ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, prefill = sampling.choose, running.engine._decoder.prefill

    def choose(logits: Tensor, samplings: list[Sampling], generators: list[Any]) -> list[int | None]:
        if any(sampling.seed == 13 for sampling in samplings):
            raise RuntimeError("a row that cannot be sampled")
        return original(logits, samplings, generators)

    monkeypatch.setattr(continuous_engine, "choose", choose)
    for _ in range(4):
        assert code_of(running.engine, ask(samples[1], 16, temperature=1.0, seed=13)) == "engine_error"
    assert running.continues()

    def without_numbers(prompts: list[Prompt]) -> tuple[Tensor, list[list[Span]]]:
        logits, spans = prefill(prompts)
        return logits * torch.nan, spans

    monkeypatch.setattr(running.engine._decoder, "prefill", without_numbers)
    for _ in range(4):
        assert code_of(running.engine, ask(samples[1], 16)) == "engine_error"
    assert running.continues()


def test_a_failed_prefill_fails_its_batch_but_not_running_requests(
    running: Running, samples: list[Sample], ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("broken")

    original = running.engine._decoder.prefill
    monkeypatch.setattr(running.engine._decoder, "prefill", broken)
    for _ in range(2):
        assert code_of(running.engine, ask(samples[1], 16)) == "engine_error"
        assert running.continues()
    monkeypatch.setattr(running.engine._decoder, "prefill", original)
    assert answer_all(running.engine, [ask(samples[1], 16)])[0].text
    # Two failures, an answer, two failures: never three consecutive ones.
    monkeypatch.setattr(running.engine._decoder, "prefill", broken)
    for _ in range(2):
        assert code_of(running.engine, ask(samples[1], 16)) == "engine_error"
    assert running.continues()


def test_the_third_consecutive_failure_stops_the_engine_despite_other_successes(
    running: Running, samples: list[Sample], ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(running.engine._decoder, "prefill", broken)
    (image,) = ask(samples[0], 16).images
    for _ in range(3):
        # An iteration with other successful work does not reset the failures of prefills.
        running.engine.inspect(image, 16).result(timeout=PATIENCE_S)
        running.engine.cancel("unknown")
        assert code_of(running.engine, ask(samples[1], 16)) == "engine_error"
    while not isinstance(end := running.inbox.get(timeout=PATIENCE_S), Failed):
        pass
    assert end.refusal.code == "engine_error"
    running.engine._thread.join(timeout=PATIENCE_S)
    assert code_of(running.engine, ask(samples[1], 16)) == "engine_error"
    with pytest.raises(EngineRefusal):
        running.engine.inspect(image, 16).result(timeout=PATIENCE_S)


def test_a_bug_in_the_loop_fails_all_waiting_requests(
    running: Running, samples: list[Sample], ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(running.engine, "_inspect_next", broken)
    while not isinstance(end := running.inbox.get(timeout=PATIENCE_S), Failed):
        pass
    assert end.refusal.code == "engine_error"
    running.engine._thread.join(timeout=PATIENCE_S)
    assert code_of(running.engine, ask(samples[1], 16)) == "engine_error"


def test_a_prefill_that_runs_out_of_memory_is_split_in_halves(
    model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample], ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ContinuousEngine(model, processor)
    plain = answer_all(engine, [ask(sample, 0, max_new_tokens=2) for sample in samples[:8]])
    original = engine._decoder.prefill
    sizes: list[int] = []

    def prefill(prompts: list[Prompt]) -> tuple[Tensor, list[list[Span]]]:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return original(prompts)

    monkeypatch.setattr(engine._decoder, "prefill", prefill)
    inbox: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    with held(engine):
        for number, sample in enumerate(samples[:8]):
            engine.submit(ask(sample, 0, max_new_tokens=2), lambda event, number=number: inbox.put((number, event)))  # type: ignore[misc]
    found = dict(inbox.get(timeout=PATIENCE_S) for _ in range(8))
    assert {number: event.text for number, event in found.items() if isinstance(event, Finished)} == {
        number: each.text for number, each in enumerate(plain)
    }
    assert max(sizes) > 2
    engine.close()


def test_one_iteration_encodes_at_most_one_batch_of_images(
    model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample], ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ContinuousEngine(model, processor, EngineConfig(vision_batch=4, kv_tokens=16384))
    hold, original = threading.Event(), engine._vision.encode
    sizes: list[int] = []

    def encode(images: Iterable[ImagePixels]) -> Encoded:
        hold.wait()
        found = original(images)
        sizes.append(len(found.new))
        return found

    monkeypatch.setattr(engine._vision, "encode", encode)
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    for sample in samples:
        engine.submit(ask(sample, 16, max_new_tokens=2), inbox.put)
    hold.set()
    assert all(isinstance(inbox.get(timeout=PATIENCE_S), Finished) for _ in samples)
    # Videos have four images, the maximum.
    assert max(sizes) == 4
    assert sum(sizes) == engine.stats().feature_cache_misses
    engine.close()


def test_a_full_engine_is_healthy(
    model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample], ask: Asker
) -> None:
    probe = HealthProbe(PromptBuilder(processor), (16, 64, 256), timeout_s=PATIENCE_S)
    for limits in (EngineConfig(max_running=1, kv_tokens=16384), EngineConfig(max_running=64, kv_tokens=4096)):
        engine = ContinuousEngine(model, processor, limits)
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        room = engine.max_request_tokens - 300 if limits.max_running > 1 else 8000 - 300
        engine.submit(ask(samples[0], 256, stream=True, max_new_tokens=room), inbox.put)
        inbox.get(timeout=PATIENCE_S)
        # Every row or every block is in use, and more requests wait.
        for sample in samples[1:4]:
            engine.submit(ask(sample, 64, max_new_tokens=600), lambda _: None)
        before = engine.stats()
        for _ in range(3):
            asyncio.run(probe.check(engine))
        after = engine.stats()
        assert (after.running, after.waiting) == (1, 3)
        # The health check ran the vision tower and did not use the cache.
        assert (after.feature_cache_hits, after.feature_cache_misses) == (
            before.feature_cache_hits,
            before.feature_cache_misses,
        )
        engine.close()


def test_an_engine_that_hangs_or_cannot_encode_is_not_healthy(
    running: Running, processor: ElasticProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(images: object) -> Encoded:
        raise RuntimeError("broken")

    probe = HealthProbe(PromptBuilder(processor), (16,), timeout_s=PATIENCE_S)
    original = running.engine._vision._encode
    monkeypatch.setattr(running.engine._vision, "_encode", failing)
    with pytest.raises(EngineRefusal):
        asyncio.run(probe.check(running.engine))
    monkeypatch.setattr(running.engine._vision, "_encode", original)
    asyncio.run(probe.check(running.engine))
    hangs, hold, step = threading.Event(), threading.Event(), running.engine._step

    def hang(jobs: list[Any]) -> None:
        hangs.set()
        hold.wait()
        step(jobs)

    monkeypatch.setattr(running.engine, "_step", hang)
    assert hangs.wait(PATIENCE_S)
    with pytest.raises(TimeoutError):
        asyncio.run(HealthProbe(PromptBuilder(processor), (16,), timeout_s=0.05).check(running.engine))
    hold.set()


def test_concurrent_health_checks_share_one_request(engine: ContinuousEngine, processor: ElasticProcessor) -> None:
    probe = HealthProbe(PromptBuilder(processor), (16,), timeout_s=PATIENCE_S)

    async def many() -> None:
        await asyncio.gather(*(probe.check(engine) for _ in range(20)))

    asyncio.run(many())
    assert engine.stats().prefilled == 1
