"""Training, evaluation, the endpoint and the planner count the same tokens for the same sample and budget."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import nn

from parcelray.config.connector import ConnectorConfig
from parcelray.config.model import MiniLlavaModelConfig
from parcelray.config.reducer import ReducerConfig
from parcelray.config.serve import EngineConfig
from parcelray.datasets.collator import Collator
from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Answer, Predictor
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.mini import build_config, build_model, build_processor
from parcelray.models.mini_llava import build
from parcelray.models.reduced_decoder import encode_prompts
from parcelray.models.token_counts import TokenCounts
from parcelray.models.token_reduction import build_reducer
from parcelray.models.token_reduction.in_decoder import InDecoderReducer
from parcelray.models.vlm import ElasticConfig
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.reduction_flops import reduced_cost
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import ImagePixels, PromptBuilder, Sampling, answer_all
from parcelray.training.step import to_tensors, with_placeholders

from .models.conftest import CONFIG, CORPUS, MINI_LLAVA, random_images


def _types(union: Any) -> dict[str, set[str]]:
    """Returns the settings of each member of a discriminated union by its `type`."""
    members = [each["properties"] for each in TypeAdapter(union).json_schema()["$defs"].values()]
    return {each["type"]["const"]: set(each) for each in members if "type" in each}


CONNECTORS, REDUCERS = _types(ConnectorConfig), _types(ReducerConfig)
BACKBONES = ("paligemma", "clip", "siglip", "convnext")
TEXTS = st.text(max_size=40) | st.sampled_from(["", "<image>", "<eos> <pad>", "what color\nis the circle ", "USER: a"])


def _reducer(name: str, backbone: str) -> ReducerConfig:
    # Without a class token, saliency has another definition.
    changes = {"definition": "norm"} if name == "saliency" and backbone != "clip" else {}
    config: ReducerConfig = TypeAdapter(ReducerConfig).validate_python({"type": name} | changes)
    return config


def _backbone(name: str, connector: str = "identity") -> tuple[ElasticVLM, ElasticProcessor]:
    heads = {"num_heads": 2} if "num_heads" in CONNECTORS[connector] else {}
    section: dict[str, Any] = {"type": connector} | heads
    if name != "paligemma":
        sizes_of_llava = MINI_LLAVA.model_dump() | {"tower": name, "vision_layers": 2}
        return build(MiniLlavaModelConfig(**sizes_of_llava), CORPUS, section, seed=0)
    sizes = CONFIG.model_copy(update={"text_layers": 3})
    processor = build_processor(sizes, CORPUS)
    config = build_config(sizes, processor)
    config.connector = section
    return build_model(config, 0), processor


@pytest.fixture(scope="module")
def processors() -> dict[str, ElasticProcessor]:
    return {name: _backbone(name)[1] for name in BACKBONES}


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    files = [io.BytesIO() for _ in range(3)]
    for image, file in zip(random_images(3), files, strict=True):
        image.save(file, "PNG")
    return [file.getvalue() for file in files]


def _sample(prompt: str, answer: str, images: list[bytes]) -> Sample:
    return Sample("s", "b", "f", "t", tuple(images), prompt, (answer,))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    backbone=st.sampled_from(BACKBONES),
    texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
    num_images=st.integers(1, 3),
    budget=st.integers(1, 256),
)
def test_all_inputs_have_the_counted_tokens(
    processors: dict[str, ElasticProcessor],
    images: list[bytes],
    backbone: str,
    texts: list[tuple[str, str]],
    num_images: int,
    budget: int,
) -> None:
    processor = processors[backbone]
    prompts, answers = [text for text, _ in texts], [answer for _, answer in texts]
    counts = [processor.count_tokens(prompt, num_images, budget, answer) for prompt, answer in texts]

    batch = to_tensors(
        Collator(processor)([_sample(prompt, answer, images[:num_images]) for prompt, answer in texts]),
        torch.device("cpu"),
        processor,
    )
    inputs = with_placeholders(batch, budget, processor.image_token_id)
    assert inputs["attention_mask"].sum(1).tolist() == [each.total for each in counts]
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [each.visual for each in counts]
    assert (batch.labels_BS != -100).sum(1).tolist() == [each.answer for each in counts]
    assert batch.tokens(budget) == TokenCounts(*map(sum, zip(*counts, strict=True)))

    evaluated = processor.prompts(prompts, num_images, num_visual_tokens=budget)
    assert evaluated["attention_mask"].sum(1).tolist() == [each.visual + each.prompt for each in counts]
    scored = processor.prompts(prompts, num_images, num_visual_tokens=budget, answers=answers)
    assert scored["attention_mask"].sum(1).tolist() == [each.total for each in counts]
    reduced = encode_prompts(processor, prompts, answers, "cpu")
    assert (reduced.valid_BT.sum(1) + len(reduced.before_O)).tolist() == [each.text for each in counts]

    pixels = [ImagePixels(str(number), 0, b"") for number in range(num_images)]
    for prompt, count in zip(prompts, counts, strict=True):
        request = PromptBuilder(processor).request(
            "r", prompt, pixels, num_visual_tokens=budget, sampling=Sampling(1), timeout_s=1
        )
        assert request.tokens == count._replace(answer=0)
        assert request.num_prompt_tokens == request.min_prompt_tokens == count.visual + count.prompt


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_prompt_without_images_has_the_same_count(processors: dict[str, ElasticProcessor], backbone: str) -> None:
    processor = processors[backbone]
    counts = processor.count_tokens("what color", 1, 0)
    blind = processor.prompts(["what color"], 1, num_visual_tokens=0)
    request = PromptBuilder(processor).request(
        "r", "what color", [], num_visual_tokens=64, sampling=Sampling(1), timeout_s=1
    )
    assert counts == processor.count_tokens("what color", 0, 64) == request.tokens
    assert counts.total == int(blind["attention_mask"].sum()) == counts.prompt


def _answer(
    model: ElasticVLM, processor: ElasticProcessor, sample: Sample, budget: int, settings: GenerationSettings
) -> tuple[Answer, list[int]]:
    """Evaluates a sample; returns the answer and the length of the prompt in each decoder layer."""
    with _recorded_lengths(model) as lengths:
        answer = Predictor(model.eval(), processor, settings=settings).answer_budgets([sample], [budget])[budget][0]
    return answer, lengths[: len(model.model.language_model.layers)]


@contextmanager
def _recorded_lengths(model: ElasticVLM) -> Iterator[list[int]]:
    """Records the number of tokens in each run of a decoder layer."""
    lengths: list[int] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        lengths.append(args[0].shape[1])

    hooks = [layer.register_forward_pre_hook(record) for layer in model.model.language_model.layers]
    try:
        yield lengths
    finally:
        for hook in hooks:
            hook.remove()


def _served(
    model: ElasticVLM, processor: ElasticProcessor, sample: Sample, budget: int, reducer: ReducerConfig
) -> tuple[TokenCounts, list[int]]:
    """Serves a sample; returns the counts of `usage` and the length of the prompt in each decoder layer."""
    prompts = PromptBuilder(processor)
    pixels = [prompts.pixels(decode_image(image)) for image in sample.images]
    request = prompts.request(
        "r", sample.prompt, pixels, num_visual_tokens=budget, sampling=Sampling(1), timeout_s=600.0
    )
    engine = ContinuousEngine(model, processor, EngineConfig(kv_tokens=1024), reducer=reducer)
    try:
        with _recorded_lengths(model) as lengths:
            (end,) = answer_all(engine, [request])
    finally:
        engine.close()
    assert end.num_visual_tokens == budget
    return request.tokens, lengths[: len(model.model.language_model.layers)]


@pytest.mark.parametrize("backbone", ["paligemma", "clip"])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_the_decoder_gets_the_counted_tokens_of_every_connector(
    backbone: str, connector: str, images: list[bytes]
) -> None:
    model, processor = _backbone(backbone, connector)
    budget = model.supported_budgets[len(model.supported_budgets) // 2]
    sample = _sample("how many red blue", "47", images[:2])
    answer, lengths = _answer(model, processor, sample, budget, GenerationSettings(max_new_tokens=1))
    assert answer.tokens == processor.count_tokens(sample.prompt, 2, budget)
    assert set(lengths) == {answer.tokens.total}


@pytest.mark.parametrize(
    ("reducer", "backbone"),
    [
        (reducer, backbone)
        for reducer in REDUCERS
        for backbone in BACKBONES
        # The convolutional tower has no attention.
        if backbone != "convnext" or build_reducer(_reducer(reducer, backbone)).reads != "encoder"
    ],
)
def test_the_decoder_gets_the_counted_tokens_of_every_reducer(
    reducer: str, backbone: str, images: list[bytes], reduced_models: dict[str, tuple[ElasticVLM, ElasticProcessor]]
) -> None:
    model, processor = reduced_models[backbone]
    config: ElasticConfig = model.config
    section = _reducer(reducer, backbone)
    built = build_reducer(section)
    legal = built.budgets_of(256, config.depths)
    budget = min(legal, key=lambda each: abs(each - 150))
    sample = _sample("how many red blue", "47", images[:2])
    settings = GenerationSettings(max_new_tokens=1, reducer=section.to_json())
    answer, lengths = _answer(model, processor, sample, budget, settings)
    assert answer.tokens == processor.count_tokens(sample.prompt, 2, budget)
    # The endpoint counts the same, and its decoder gets as many tokens in each layer.
    assert _served(model, processor, sample, budget, section) == (answer.tokens, lengths)
    planned = reduced_cost(from_transformers_config(config), section, budget, 2, answer.tokens.text).tokens_by_layer
    if isinstance(built, InDecoderReducer):
        # Whole tokens in whole layers reach the mean only to within a token per stage.
        assert 0 <= answer.tokens.visual - sum(planned) / len(planned) < 3
        assert lengths[0] == planned[0] + answer.tokens.text
    else:
        assert set(planned) == {answer.tokens.visual}
        assert lengths[-1] == answer.tokens.total


@pytest.fixture(scope="module")
def reduced_models() -> dict[str, tuple[ElasticVLM, ElasticProcessor]]:
    return {name: _backbone(name) for name in BACKBONES}
