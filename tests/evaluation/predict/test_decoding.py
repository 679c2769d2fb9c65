"""Greedy decoding is the same in evaluation, serving and the reduced decoder, whatever the checkpoint's settings."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from parcelray.config.serve import EngineConfig
from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.errors import NotFiniteError
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Answer, Predictor
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.decoding import NOT_FINITE, end_token_ids
from parcelray.models.mini import build_config, build_model, build_processor
from parcelray.models.mini_llava import build as build_llava
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import EngineRefusal, PromptBuilder, Sampling, answer_all
from tests.benchmarks.table_data import png
from tests.models.conftest import CONFIG, CORPUS, MINI_LLAVA

NEW_TOKENS = 6
FULL = 256
FASTV = '{"type": "fastv", "layer": 1}'
Model = tuple[ElasticVLM, ElasticProcessor]


@pytest.fixture(scope="module", params=["paligemma", "llava"])
def trained(request: pytest.FixtureRequest) -> Model:
    """A model without compression, of each family."""
    model: ElasticVLM
    processor: ElasticProcessor
    if request.param == "llava":
        model, processor = build_llava(MINI_LLAVA, CORPUS, None, seed=0)
    else:
        paligemma_processor = build_processor(CONFIG, CORPUS)
        processor = paligemma_processor
        model = build_model(build_config(CONFIG, paligemma_processor), 0)
    model.eval()
    with torch.no_grad():
        # With random weights, attention is nearly uniform, and tied embeddings repeat the last word; both are adjusted.
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
        model.get_input_embeddings().get_parameter("weight").mul_(0.2)
    return model, processor


@pytest.fixture
def case(trained: Model) -> Iterator[Model]:
    """The same model; changes of its generation settings are undone."""
    model, processor = trained
    before = copy.deepcopy(model.generation_config)
    yield model, processor
    model.generation_config = before


def _sample(prompt: str, color: int = 0, **changes: Any) -> Sample:
    values = {
        "id": prompt,
        "benchmark": "b",
        "family": "f",
        "task": "t",
        "images": (png((40 * color, 255 - 40 * color, 90)),),
        "prompt": prompt,
        "answers": ("red",),
        "metadata": {"choices": ["red", "blue green"]},
    }
    return Sample(**(values | changes))


SAMPLES = [_sample("what color is the circle", 1), _sample("how many red", 2), _sample("which image has more", 3)]


def _evaluated(case: Model, samples: list[Sample], budget: int = FULL, **settings: Any) -> list[Answer]:
    options = GenerationSettings(**{"max_new_tokens": NEW_TOKENS, **settings})
    return Predictor(*case, settings=options).answer_budgets(samples, [budget])[budget]


def _served(case: Model, samples: list[Sample]) -> list[tuple[str, int, bool]]:
    """Answers of the engine: text, number of new tokens, and whether they are cut off."""
    model, processor = case
    builder = PromptBuilder(processor)
    requests = [
        builder.request(
            sample.id,
            sample.prompt,
            [builder.pixels(decode_image(image)) for image in sample.images],
            num_visual_tokens=FULL,
            sampling=Sampling(max_new_tokens=NEW_TOKENS),
            timeout_s=300.0,
        )
        for sample in samples
    ]
    engine = ContinuousEngine(model, processor, EngineConfig(kv_tokens=4096))
    try:
        answers = answer_all(engine, requests)
    finally:
        engine.close()
    return [(answer.text, answer.num_new_tokens, answer.reason == "length") for answer in answers]


def _summary(answers: list[Answer]) -> list[tuple[str, int, bool]]:
    return [(answer.text, answer.num_new_tokens, answer.cut_off) for answer in answers]


def _first_tokens(case: Model) -> list[int]:
    model, processor = case
    inputs = dict(processor([[decode_image(SAMPLES[0].images[0])]], [SAMPLES[0].prompt]))
    inputs = {key: value for key, value in inputs.items() if model.reads_both_ways or key != "token_type_ids"}
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    return [int(token) for token in ids[0, inputs["input_ids"].shape[1] :]]


SETTINGS: list[tuple[str, Callable[[list[int]], dict[str, Any]]]] = [
    ("repetition_penalty", lambda ids: {"repetition_penalty": 50.0}),
    ("encoder_repetition_penalty", lambda ids: {"encoder_repetition_penalty": 50.0}),
    ("no_repeat_ngram_size", lambda ids: {"no_repeat_ngram_size": 1}),
    ("min_new_tokens", lambda ids: {"min_new_tokens": NEW_TOKENS, "eos_token_id": [ids[1]]}),
    ("min_length", lambda ids: {"min_length": 1000}),
    ("max_length", lambda ids: {"max_length": 3}),
    ("bad_words", lambda ids: {"bad_words_ids": [[ids[0]]]}),
    ("suppress_tokens", lambda ids: {"suppress_tokens": ids[:2]}),
    ("begin_suppress_tokens", lambda ids: {"begin_suppress_tokens": ids[:1]}),
    ("forced_bos", lambda ids: {"forced_bos_token_id": ids[1]}),
    ("forced_eos", lambda ids: {"forced_eos_token_id": ids[0]}),
    ("sequence_bias", lambda ids: {"sequence_bias": [[[ids[0]], -100.0]]}),
    ("exponential_decay", lambda ids: {"exponential_decay_length_penalty": [1, 50.0]}),
    ("sampling", lambda ids: {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1}),
    ("beams", lambda ids: {"num_beams": 4, "length_penalty": -5.0, "early_stopping": True}),
    ("guidance", lambda ids: {"guidance_scale": 3.0}),
    ("stop_strings", lambda ids: {"stop_strings": ["a"]}),
]


@pytest.mark.parametrize(("name", "changed"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_settings_of_the_checkpoint_have_no_effect(
    case: Model, name: str, changed: Callable[[list[int]], dict[str, Any]]
) -> None:
    model, _ = case
    values = changed(_first_tokens(case))
    ends = {key: value for key, value in values.items() if key == "eos_token_id"}
    model.generation_config = GenerationConfig(**ends)
    plain = _summary(_evaluated(case, SAMPLES))
    beams = _summary(_evaluated(case, SAMPLES, decoding="beam", num_beams=2))
    model.generation_config = own = GenerationConfig(**values)
    assert _summary(_evaluated(case, SAMPLES)) == plain
    assert _summary(_evaluated(case, SAMPLES, decoding="beam", num_beams=2)) == beams
    assert model.generation_config is own, "a checkpoint that is saved later keeps its settings"


def test_settings_in_the_configuration_of_the_model_have_no_effect(
    case: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _summary(_evaluated(case, SAMPLES))
    monkeypatch.setattr(case[0].config, "repetition_penalty", 50.0, raising=False)
    assert _summary(_evaluated(case, SAMPLES)) == plain


def test_serving_and_evaluation_answer_alike_to_names_of_control_tokens(case: Model) -> None:
    names = _sample("what is <image> <eos> <pad><bos>?", 4)
    assert _served(case, [names]) == _summary(_evaluated(case, [names]))


def test_the_settings_would_change_the_answers_of_transformers(case: Model) -> None:
    model, _ = case
    plain = _first_tokens(case)
    changed = {name: settings(plain) for name, settings in SETTINGS}
    for name in ("bad_words", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"):
        model.generation_config = GenerationConfig(**changed[name])
        assert _first_tokens(case) != plain, name


def test_every_path_ends_an_answer_at_every_end_token(case: Model) -> None:
    """The second token of an answer is an end token of the checkpoint, not of the tokenizer."""
    model, processor = case
    before = _evaluated(case, SAMPLES)
    second = _first_tokens(case)[1]
    model.generation_config = GenerationConfig(
        eos_token_id=[processor.tokenizer.eos_token_id, second], repetition_penalty=50.0
    )
    answers = _summary(_evaluated(case, SAMPLES))
    position = _first_tokens_until(case, second)
    assert answers[0][1:] == (position + 1, False)
    assert before[0].text.startswith(answers[0][0])
    assert before[0].cut_off
    assert _served(case, SAMPLES) == answers
    # At nearly the full budget the reduced decoder gives the same answers or others, but ends them the same way.
    for answer in _evaluated(case, SAMPLES, budget=255, reducer=FASTV):
        ids = processor.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        assert second not in ids[1:]
        assert answer.num_new_tokens <= NEW_TOKENS


def _first_tokens_until(case: Model, token: int) -> int:
    model, _ = case
    model.generation_config, own = GenerationConfig(), model.generation_config
    position = _first_tokens(case).index(token)
    model.generation_config = own
    return position


@pytest.mark.parametrize(
    ("generation", "outer", "text", "expected"),
    [
        (None, None, None, set()),
        (7, None, None, {7}),
        ([7, 387], None, None, {7, 387}),
        ([7], 8, None, {7, 8}),
        ([7], [8, 9], 10, {7, 8, 9}),
        (None, None, 10, {10}),
        (None, None, [10, 11], {10, 11}),
    ],
)
def test_end_tokens_are_the_union_of_all_sources(
    case: Model, monkeypatch: pytest.MonkeyPatch, generation: Any, outer: Any, text: Any, expected: set[int]
) -> None:
    model, processor = case
    monkeypatch.setattr(model.generation_config, "eos_token_id", generation)
    monkeypatch.setattr(model.config, "eos_token_id", outer)
    monkeypatch.setattr(model.config.text_config, "eos_token_id", text)
    assert end_token_ids(model, processor.tokenizer) == expected | {processor.tokenizer.eos_token_id}


POISON = "47"


@pytest.fixture(params=[math.nan, math.inf, -math.inf], ids=str)
def poisoned(case: Model, request: pytest.FixtureRequest) -> Iterator[Model]:
    """A model whose hidden states are not finite for prompts with a certain word."""
    model, processor = case
    token = processor.encode_text([f"red {POISON}"])[0][-1]

    def poison(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.masked_fill((args[0] == token)[..., None], request.param)

    handle = model.get_input_embeddings().register_forward_hook(poison)
    yield model, processor
    handle.remove()


BAD = _sample(f"how many blue {POISON}", 4)
MIXED = [SAMPLES[0], BAD, SAMPLES[1]]


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({}, FULL),
        ({"decoding": "beam", "num_beams": 2}, FULL),
        ({"decoding": "likelihood"}, FULL),
        ({"reducer": FASTV}, 200),
        ({"reducer": FASTV, "decoding": "likelihood"}, 200),
        ({"reducer": '{"type": "saliency", "definition": "last_text", "layer": 0}'}, 100),
        ({"reducer": '{"type": "restore"}'}, 100),
    ],
    ids=str,
)
def test_a_prompt_without_finite_logits_has_a_problem_and_others_are_unaffected(
    poisoned: Model, settings: dict[str, Any], budget: int
) -> None:
    answers = _evaluated(poisoned, MIXED, budget, **settings)
    assert [answer.problem for answer in answers] == ["", NOT_FINITE, ""]
    alone = [_evaluated(poisoned, [sample], budget, **settings)[0] for sample in MIXED]
    assert _summary(answers) == _summary(alone)


def test_validation_and_serving_refuse_logits_that_are_not_finite(poisoned: Model) -> None:
    predictor = Predictor(*poisoned, settings=GenerationSettings(max_new_tokens=1))
    with pytest.raises(NotFiniteError, match="Sample 'how many blue 47' of b: The model's logits are not finite"):
        predictor.generate_budgets(MIXED, [0, FULL])
    with pytest.raises(EngineRefusal) as refusal:
        _served(poisoned, [BAD])
    assert (refusal.value.code, refusal.value.message) == ("engine_error", NOT_FINITE)


def test_a_single_infinite_logit_is_a_problem(case: Model) -> None:
    model, _ = case
    handle = model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([5]), math.inf)
    )
    try:
        assert {answer.problem for answer in _evaluated(case, SAMPLES)} == {NOT_FINITE}
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "reducer", ['{"type": "divprune"}', '{"type": "cluster_aggregate"}', '{"type": "visionzip"}', FASTV]
)
def test_an_image_without_finite_features_is_a_problem_of_its_sample(case: Model, reducer: str) -> None:
    model, _ = case
    black = _sample("how many red", images=(png((0, 0, 0)),))

    def poison(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        black_I = (args[0] < -0.99).flatten(1).all(1)
        return (args[0].masked_fill(black_I[:, None, None, None], math.nan),)

    handle = model.model.vision_tower.register_forward_pre_hook(poison)
    try:
        answers = _evaluated(case, [SAMPLES[0], black, SAMPLES[1]], 200, reducer=reducer)
    finally:
        handle.remove()
    assert [answer.problem for answer in answers] == ["", NOT_FINITE, ""]


def test_a_problem_at_one_of_several_budgets_is_raised(case: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(*case)
    given = {16: [Answer("a", 1, False)], 64: [Answer("", 0, False, NOT_FINITE)]}
    monkeypatch.setattr(predictor, "answer_budgets", lambda samples, budgets: given)
    with pytest.raises(NotFiniteError):
        predictor.generate_budgets(SAMPLES[:1], [16, 64])
