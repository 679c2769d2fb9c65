"""Tests that the engine with a training-free reducer answers as an evaluation does, in mixed batches."""

import asyncio
import queue
import random
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from parcelray.config.model import MiniLlavaModelConfig
from parcelray.config.reducer import FastVConfig, ReducerConfig
from parcelray.config.serve import EngineConfig
from parcelray.datasets.sample import Sample
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.mini import build_config, build_model, build_processor
from parcelray.models.mini_llava import build
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import EngineRefusal, Event, Finished, Piece, PromptBuilder, answer_all
from parcelray.serving.replica.load import HealthProbe
from tests.models.conftest import CONFIG, CORPUS, MINI_LLAVA
from tests.serving.conftest import Asker
from tests.serving.local import PATIENCE_S, held

LENGTH = 5
CLEAR = 1e-3
"""Minimum difference of the two largest logits for a token to be compared, as in `test_offline_parity`."""
# Every kind of reducer: before the decoder by tokens, by the vision tower and inside it; by the prompt; between layers;
# with each kind of positions and of attention.
REDUCERS: list[dict[str, Any]] = [
    {"type": "cluster_aggregate"},
    {"type": "cluster_aggregate", "positions": "image_size_bias"},
    {"type": "spatial_sampling", "positions": "image"},
    {"type": "visionzip"},
    {"type": "tome"},
    {"type": "restore"},
    {"type": "mmtok"},
    {"type": "saliency", "definition": "mean_text", "layer": 1},
    {"type": "fastv", "layer": 1},
    {"type": "pyramid_drop", "positions": "contiguous"},
    {"type": "pyramid_drop", "positions": "image_calibrated"},
    {"type": "sparsevlm"},
]
QUICK = {("paligemma", 1), ("llava", 4), ("paligemma", 7), ("llava", 9), ("paligemma", 10)}
"""Family and index of the reducers that every run of the tests covers."""
CASES = [
    pytest.param(
        family,
        reducer,
        id=f"{family}-{'-'.join(map(str, reducer.values()))}",
        marks=[] if (family, index) in QUICK else [pytest.mark.nightly],
    )
    for index, reducer in enumerate(REDUCERS)
    for family in ("paligemma", "llava")
]


def _sharp(model: ElasticVLM) -> ElasticVLM:
    """Makes a random model's answers depend on its attention and its answers differ."""
    model.eval()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
        model.get_input_embeddings().get_parameter("weight").mul_(0.2)
    return model


@pytest.fixture(scope="module")
def models(samples: list[Sample]) -> dict[str, tuple[ElasticVLM, ElasticProcessor]]:
    texts = [*CORPUS, *(sample.prompt for sample in samples)]
    processor = build_processor(CONFIG, texts)
    config = build_config(CONFIG.model_copy(update={"text_layers": 4}), processor)
    # Shorter than the prompts of more than one image.
    config.text_config.sliding_window = 300
    llava, llava_processor = build(
        MiniLlavaModelConfig(**MINI_LLAVA.model_dump() | {"vision_layers": 4}), texts, {"type": "identity"}, seed=1
    )
    return {"paligemma": (_sharp(build_model(config, 1)), processor), "llava": (_sharp(llava), llava_processor)}


@pytest.mark.parametrize(("family", "reducer"), CASES)
def test_answers_equal_those_of_an_evaluation(
    family: str,
    reducer: dict[str, Any],
    models: dict[str, tuple[ElasticVLM, ElasticProcessor]],
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = models[family]
    for module in ("serving.engine.continuous_engine", "evaluation.predict.predictor"):
        monkeypatch.setattr(f"parcelray.{module}.end_token_ids", lambda *_: frozenset())
    config: ReducerConfig = TypeAdapter(ReducerConfig).validate_python(reducer)
    engine = ContinuousEngine(model, processor, EngineConfig(max_running=16, kv_tokens=16384), reducer=config)
    few, many = (min(engine.supported_budgets, key=lambda each: abs(each - wanted)) for wanted in (100, 200))
    budgets = (0, few, many, 256)
    # One, two and four images.
    own = [samples[index] for index in (0, 3, 29, 45)]
    settings = GenerationSettings(max_new_tokens=LENGTH, reducer=config.to_json())
    expected = Predictor(model, processor, settings=settings).answer_budgets(own, budgets)
    mixed = [(index, budget) for index in range(len(own)) for budget in budgets]
    random.Random(0).shuffle(mixed)
    asker = Asker(processor)
    requests = [asker(own[index], budget, max_new_tokens=LENGTH, logprobs=2) for index, budget in mixed]
    answers = answer_all(engine, requests)
    stats = engine.stats()
    engine.close()
    compared = 0
    for (index, budget), request, answer in zip(mixed, requests, answers, strict=True):
        evaluated = expected[budget][index]
        assert request.tokens == evaluated.tokens
        assert answer.num_new_tokens == evaluated.num_new_tokens == LENGTH
        if all(each.top[0][1] - each.top[1][1] > CLEAR for each in answer.logprobs):
            compared += 1
            assert answer.text == evaluated.text, (index, budget)
    assert compared > 0.5 * len(mixed)
    assert len({each.text for each in answers}) > 4, "the test is meaningful only if answers differ"
    assert (stats.kv_tokens_used, stats.decoded_rows > 2 * stats.steps) == (0, True)
    assert stats.feature_cache_misses == len({image.content for request in requests for image in request.images})


def test_a_reducer_inside_the_decoder_holds_the_mean_over_the_layers_in_the_kv_cache(
    models: dict[str, tuple[ElasticVLM, ElasticProcessor]], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of three layers holds 256 visual tokens, the others 7, and the mean is 90."""
    model, processor = models["llava"]
    monkeypatch.setattr("parcelray.serving.engine.continuous_engine.end_token_ids", lambda *_: frozenset())
    asker = Asker(processor)
    requests = [asker(samples[index], 90, max_new_tokens=8) for index in range(4)]
    # With all patches in every layer, there would be room for one request.
    largest = max(request.tokens_at(256).total for request in requests)
    probe = HealthProbe(PromptBuilder(processor), (90,), timeout_s=PATIENCE_S)
    engine = ContinuousEngine(
        model,
        processor,
        EngineConfig(kv_tokens=2 * largest),
        urgent_tokens=probe.num_tokens,
        reducer=FastVConfig(layer=1),
    )
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with held(engine):
        for request in requests:
            engine.submit(request, inbox.put)
    answers = [inbox.get(timeout=PATIENCE_S) for _ in requests]
    stats = engine.stats()
    # The longest request that is accepted finds room, and the next longer one is refused.
    room = engine.max_request_tokens - asker(samples[0], 90).min_prompt_tokens
    engine.submit(asker(samples[0], 90, stream=True, max_new_tokens=room, timeout_s=PATIENCE_S), inbox.put)
    last = inbox.get(timeout=PATIENCE_S)
    # Now only the blocks of the health check are free.
    asyncio.run(probe.check(engine))
    while isinstance(last, Piece):
        last = inbox.get(timeout=PATIENCE_S)
    with pytest.raises(EngineRefusal, match="lower max_tokens or the visual-token budget"):
        engine.submit(asker(samples[0], 90, max_new_tokens=room + 1), lambda _: None)
    engine.close()
    assert isinstance(last, Finished)
    assert last.num_new_tokens == room
    assert [answer.num_new_tokens for answer in answers if isinstance(answer, Finished)] == [8] * 4
    assert stats.decoded_rows == 4 * stats.steps
    assert stats.kv_tokens_used == 0
