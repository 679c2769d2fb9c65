"""Tests of the `Engine` interface, which hold for every engine."""

import asyncio
import functools
import queue
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from parcelray.config.serve import EngineConfig
from parcelray.datasets.sample import Sample
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import (
    Engine,
    EngineRefusal,
    Event,
    Failed,
    Finished,
    Piece,
    answer_all,
    check_request,
    events,
)
from tests.serving.conftest import Asker
from tests.serving.local import PATIENCE_S, held

Build = Callable[..., Engine]


@pytest.fixture
def build(model: ElasticVLM, processor: ElasticProcessor) -> Iterator[Build]:
    """Builds engines with some limits, and closes them after the test."""
    engines: list[Engine] = []

    def make(**limits: Any) -> Engine:
        config = EngineConfig(**{"max_running": 8, "kv_tokens": 8192, **limits})
        engines.append(ContinuousEngine(model, processor, config, name="it"))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_greedy_answers_equal_offline_generation(
    build: Build, model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample], ask: Asker
) -> None:
    budgets = (0, 16, 256)
    plain = Predictor(model, processor, settings=GenerationSettings(max_new_tokens=8)).answer_budgets(
        samples[::3], budgets
    )
    mixed = [(index, budget) for index in range(len(samples[::3])) for budget in budgets]
    random.Random(0).shuffle(mixed)
    answers = answer_all(build(), [ask(samples[::3][index], budget) for index, budget in mixed])
    for (index, budget), each in zip(mixed, answers, strict=True):
        offline = plain[budget][index]
        assert (each.text, each.num_new_tokens, each.reason) == (
            offline.text,
            offline.num_new_tokens,
            "length" if offline.cut_off else "stop",
        )
        assert each.num_visual_tokens == budget
        assert each.stats.engine == "it"


def test_pieces_join_to_the_answer_and_precede_one_end(build: Build, samples: list[Sample], ask: Asker) -> None:
    engine = build()

    async def listen(sample: Sample) -> list[Piece | Finished]:
        return [event async for event in events(engine, ask(sample, 16, stream=True, max_new_tokens=12, logprobs=1))]

    async def all_of_them() -> list[list[Piece | Finished]]:
        return await asyncio.gather(*(listen(sample) for sample in samples[:6]))

    for *pieces, end in asyncio.run(all_of_them()):
        assert isinstance(end, Finished)
        assert all(isinstance(piece, Piece) and piece.num_visual_tokens == 16 for piece in pieces)
        assert "".join(piece.text for piece in pieces) == end.text
        assert [each for piece in pieces for each in piece.logprobs] == list(end.logprobs)


def test_a_seed_gives_the_same_samples_in_any_batch(build: Build, samples: list[Sample], ask: Asker) -> None:
    engine = build()
    requests = [ask(sample, 16, temperature=2.0, top_p=0.9, seed=5, max_new_tokens=12) for sample in samples[:6]]
    together = [each.text for each in answer_all(engine, requests)]
    alone = [answer_all(engine, [each])[0].text for each in requests]
    # The last digit of the logits depends on the batch. It decides about one token in ten thousand, at the edge between
    # two tokens, and there are 72.
    assert sum(a != b for a, b in zip(together, alone, strict=True)) <= 1
    assert together != [
        each.text
        for each in answer_all(engine, [ask(sample, 16, temperature=2.0, top_p=0.9, seed=6) for sample in samples[:6]])
    ]


def test_requests_that_cannot_be_answered_are_rejected_at_once(build: Build, samples: list[Sample], ask: Asker) -> None:
    engine = build(kv_tokens=128, max_running=1, max_waiting=0)
    for request, code in (
        (ask(samples[0], 256), "context_length_exceeded"),
        (ask(samples[0], 17), "unsupported_budget"),
    ):
        with pytest.raises(EngineRefusal) as refusal:
            engine.submit(request, lambda _: None)
        assert refusal.value.code == code
    with held(engine), pytest.raises(EngineRefusal) as refusal:
        answer_all(engine, [ask(sample, 16, max_new_tokens=64) for sample in samples[:3]])
    assert refusal.value.code == "queue_full"


def test_an_image_takes_all_its_positions_at_every_budget(samples: list[Sample], ask: Asker) -> None:
    request = ask(next(sample for sample in samples if len(sample.images) == 4), 16)
    check = functools.partial(check_request, request, 8192, (16,), chooses=False, max_positions=1024)
    check(positions_per_image=None)
    with pytest.raises(EngineRefusal, match="because an image takes 256 at every budget, but the model has 1024"):
        check(positions_per_image=256)


def test_cancelled_late_and_closed_requests_end_with_their_code(
    build: Build, samples: list[Sample], ask: Asker, never_ending: None
) -> None:
    engine = build()
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def code() -> str:
        end = inbox.get(timeout=PATIENCE_S)
        assert isinstance(end, Failed)
        return end.refusal.code

    long = ask(samples[0], 16, max_new_tokens=900)
    engine.submit(long, inbox.put)
    engine.cancel(long.request_id)
    assert code() == "cancelled"
    # Hundreds of tokens take longer than the timeout on any machine.
    engine.submit(ask(samples[0], 16, max_new_tokens=900, timeout_s=0.05), inbox.put)
    assert code() == "deadline_exceeded"
    engine.submit(ask(samples[0], 16, max_new_tokens=900), inbox.put)
    engine.close()
    assert code() == "shutting_down"
    with pytest.raises(EngineRefusal) as refusal:
        engine.submit(long, inbox.put)
    assert refusal.value.code == "shutting_down"
    assert inbox.empty()


def test_a_cancelled_inspection_has_no_effect_on_others(
    build: Build, samples: list[Sample], ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()
    (image,) = ask(samples[0], 16).images
    hold = threading.Event()
    vision = engine._vision  # type: ignore[attr-defined]
    original = vision.inspect
    monkeypatch.setattr(vision, "inspect", lambda *arguments: hold.wait() and original(*arguments))
    first, second = engine.inspect(image, 16), engine.inspect(image, 16)
    assert second.cancel()
    hold.set()
    assert first.result(timeout=PATIENCE_S).grid == 16
    assert answer_all(engine, [ask(samples[0], 16)])[0].text
    assert engine.stats().feature_cache_hits == 1, "the inspected image is in the cache"
