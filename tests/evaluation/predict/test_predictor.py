"""Predictions at any budget: the same alone and in a batch, from one encoding of each image, and blind."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from parcelray.config.connector import ParcelConnectorConfig
from parcelray.config.evaluate import BLIND
from parcelray.config.model import MiniModelConfig
from parcelray.datasets.boxes import Box, format_locations, parse_locations
from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.errors import SystemFailure, UnsupportedBudgetError, UserError
from parcelray.evaluation.predict.confidence import UNKNOWN
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor as Processor
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.mini import build_config, build_model, build_processor
from parcelray.models.mini_llava import build as build_llava

from ...models.conftest import MINI_LLAVA

Decoding = Literal["greedy", "likelihood"]
CONFIG = MiniModelConfig(
    vision_width=24,
    vision_layers=1,
    vision_heads=2,
    vision_mlp_width=32,
    text_width=24,
    text_layers=1,
    text_heads=2,
    text_kv_heads=1,
    text_mlp_width=32,
)
PROMPTS = (
    "how many",
    "what color is the small red circle",
    "which image has more blue circles",
    "true or false: there is a tower",
)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return build_processor(CONFIG, PROMPTS * 10)


@pytest.fixture(scope="module")
def model(processor: Processor) -> ElasticVLM:
    config = build_config(CONFIG, processor)
    config.connector = ParcelConnectorConfig(num_heads=2).model_dump(mode="json")
    model = build_model(config, 0)
    model.eval()
    with torch.no_grad():
        # The embeddings are also the output head: at their usual scale an untrained model repeats the prompt's last
        # token.
        model.get_input_embeddings().get_parameter("weight").mul_(0.02)
    return model


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Twelve questions about one, two or three images of noise."""
    rng = np.random.default_rng(0)
    return [_sample(index, [_png(rng) for _ in range(1 + index % 3)]) for index in range(12)]


def _png(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def _sample(index: int, images: Sequence[bytes]) -> Sample:
    return Sample(
        id=str(index),
        benchmark="b",
        family="f",
        task="t",
        images=tuple(images),
        prompt=PROMPTS[index % len(PROMPTS)],
        answers=("red",),
        scene=str(index),
    )


def test_a_batch_answers_as_one_sample_at_a_time(
    model: ElasticVLM, processor: Processor, samples: list[Sample]
) -> None:
    together = Predictor(
        model, processor, batch_size=64, settings=GenerationSettings(max_new_tokens=4)
    ).generate_budgets(samples, [BLIND, 16, 40])
    alone = Predictor(model, processor, batch_size=1, settings=GenerationSettings(max_new_tokens=4)).generate_budgets(
        samples, [40, 16, BLIND]
    )
    assert together == alone
    assert len(set(together[16])) >= 6, "the test means something only if answers differ"


def test_an_answer_equals_that_of_the_stock_model(
    model: ElasticVLM, processor: Processor, samples: list[Sample]
) -> None:
    sample = samples[1]
    inputs = processor([[decode_image(image) for image in sample.images]], [sample.prompt], num_visual_tokens=40)
    with torch.inference_mode():
        tokens_BS = model.generate(**inputs, num_visual_tokens=40, max_new_tokens=4, do_sample=False)
    expected = processor.decode(tokens_BS[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert Predictor(model, processor, settings=GenerationSettings(max_new_tokens=4)).generate(
        [sample], num_visual_tokens=40
    ) == [expected]


def test_each_image_is_encoded_once_for_all_budgets_and_questions(
    model: ElasticVLM, processor: Processor, samples: list[Sample]
) -> None:
    encoded: list[int] = []

    def count(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        encoded.append(len(arguments[0]))

    handle = model.model.vision_tower.register_forward_pre_hook(count)
    try:
        Predictor(model, processor, settings=GenerationSettings(max_new_tokens=1)).generate_budgets(
            samples, [BLIND, 16, 64, 256]
        )
        assert sum(encoded) == sum(len(sample.images) for sample in samples)
        # Twelve more questions about the same images.
        again = [dataclasses.replace(sample, id=f"{sample.id}b", prompt="true or false") for sample in samples]
        encoded.clear()
        shared = Predictor(model, processor, settings=GenerationSettings(max_new_tokens=2)).generate_budgets(
            [*samples, *again], [16]
        )[16]
        assert sum(encoded) == sum(len(sample.images) for sample in samples)
        apart = Predictor(model, processor, settings=GenerationSettings(max_new_tokens=2))
        assert shared == apart.generate(samples, num_visual_tokens=16) + apart.generate(again, num_visual_tokens=16)
        encoded.clear()
        Predictor(model, processor, settings=GenerationSettings(max_new_tokens=1)).generate(
            samples, num_visual_tokens=BLIND
        )
        assert sum(encoded) == 0, "the blind model looks at nothing"
    finally:
        handle.remove()


@pytest.mark.parametrize("budget", [BLIND, 16, 256])
def test_the_decoder_gets_as_many_visual_tokens_as_the_budget(
    model: ElasticVLM, processor: Processor, samples: list[Sample], budget: int
) -> None:
    lengths: list[int] = []

    def look(module: torch.nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        lengths.append(keywords["inputs_embeds"].shape[1])

    handle = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        Predictor(model, processor, settings=GenerationSettings(max_new_tokens=2)).generate(
            [samples[2]], num_visual_tokens=budget
        )
    finally:
        handle.remove()
    text = len(
        processor.tokenizer(f"{processor.tokenizer.bos_token}{samples[2].prompt}\n", add_special_tokens=False)[
            "input_ids"
        ]
    )
    # The prompt, then one new token on top of the cached prompt.
    assert lengths == [3 * budget + text, 1]


def test_blind_answers_do_not_depend_on_the_images(
    model: ElasticVLM, processor: Processor, samples: list[Sample]
) -> None:
    predictor = Predictor(model, processor, settings=GenerationSettings(max_new_tokens=4))
    other = [_sample(index, [_png(np.random.default_rng(99))]) for index in range(12)]
    assert predictor.generate(samples, num_visual_tokens=BLIND) == predictor.generate(other, num_visual_tokens=BLIND)
    assert predictor.generate(samples, num_visual_tokens=16) != predictor.generate(other, num_visual_tokens=16)


def test_an_illegal_budget_is_refused(model: ElasticVLM, processor: Processor, samples: list[Sample]) -> None:
    with pytest.raises(UnsupportedBudgetError, match="legal budgets are 16 to 256"):
        Predictor(model, processor).generate(samples, num_visual_tokens=8)


def test_a_processor_of_another_model_is_a_failure(
    model: ElasticVLM, processor: Processor, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "image_token_id", processor.image_token_id - 1)
    with pytest.raises(SystemFailure, match="holds 0 visual tokens, but the budget requires 16"):
        Predictor(model, processor).generate(samples[:1], num_visual_tokens=16)


@pytest.mark.parametrize("decoding", ["greedy", "likelihood"])
def test_questions_and_choices_may_name_control_tokens(
    model: ElasticVLM, processor: Processor, samples: list[Sample], decoding: Decoding
) -> None:
    names = "<image> <eos> <pad> <bos>"
    named = dataclasses.replace(
        samples[0], prompt=f"what is {names}", metadata={"choices": ["<eos>", "<image><image>", names]}
    )
    plain = dataclasses.replace(samples[3], metadata={"choices": ["red"]})
    settings = GenerationSettings(max_new_tokens=4, decoding=decoding)
    together = Predictor(model, processor, settings=settings).generate_budgets([named, plain], [BLIND, 16])
    for budget in (BLIND, 16):
        alone = Predictor(model, processor, settings=settings).generate([named], num_visual_tokens=budget)
        assert together[budget][0] == alone[0]


def test_location_tokens_survive_decoding(processor: Processor) -> None:
    box = Box(0.1, 0.2, 0.5, 0.9)
    tokens = processor.tokenizer(format_locations(box), add_special_tokens=False)["input_ids"]
    assert len(tokens) == 4
    assert parse_locations(processor.batch_decode([tokens], skip_special_tokens=True)[0]) == parse_locations(
        format_locations(box)
    )


@pytest.mark.parametrize(
    "settings",
    [GenerationSettings(max_new_tokens=4, decoding="beam", num_beams=3), GenerationSettings(decoding="likelihood")],
)
def test_other_decodings_do_not_depend_on_the_batch(
    model: ElasticVLM, processor: Processor, samples: list[Sample], settings: GenerationSettings
) -> None:
    with_choices = [
        dataclasses.replace(sample, metadata={"choices": ["red", "blue", "a tower of circles", "2"]})
        for sample in samples
    ]
    together = Predictor(model, processor, settings=settings).answer_budgets(with_choices, [BLIND, 16])
    alone = Predictor(model, processor, settings=settings, batch_size=1).answer_budgets(with_choices, [BLIND, 16])
    for budget in (BLIND, 16):
        for one, other in zip(together[budget], alone[budget], strict=True):
            assert one._replace(confidence=UNKNOWN) == other._replace(confidence=UNKNOWN)
            # Kernels round differently for different batch sizes: about 1e-7 of each log-probability, seen in the
            # seventh digit.
            unknown = other.confidence == UNKNOWN
            assert one.confidence == (UNKNOWN if unknown else pytest.approx(other.confidence, rel=1e-4))
    assert len({answer.text for answer in together[16]}) > 1


def test_a_beam_search_equals_that_of_the_stock_model(
    model: ElasticVLM, processor: Processor, samples: list[Sample]
) -> None:
    sample = samples[1]
    inputs = processor([[decode_image(image) for image in sample.images]], [sample.prompt], num_visual_tokens=16)
    with torch.inference_mode():
        tokens_BS = model.generate(**inputs, num_visual_tokens=16, max_new_tokens=4, do_sample=False, num_beams=3)
    expected = processor.decode(tokens_BS[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    settings = GenerationSettings(max_new_tokens=4, decoding="beam", num_beams=3)
    assert Predictor(model, processor, settings=settings).generate([sample], num_visual_tokens=16) == [expected]


def test_the_chosen_answer_is_the_likeliest(model: ElasticVLM, processor: Processor, samples: list[Sample]) -> None:
    choices = ["red", "blue", "how many", "2"]
    # An empty choice is no answer, although its end token alone would be likelier than any text.
    sample = dataclasses.replace(samples[1], metadata={"choices": ["", *choices]})
    images = [[decode_image(image) for image in sample.images]]
    losses = []
    for choice in choices:
        inputs = processor(images, [sample.prompt], suffix=[choice], num_visual_tokens=16)
        with torch.inference_mode():
            logits_SV = model(**inputs, num_visual_tokens=16).logits[0].float().log_softmax(-1)
        positions = (inputs["labels"][0] != -100).nonzero().flatten()
        losses.append(sum(float(logits_SV[position - 1, inputs["labels"][0, position]]) for position in positions))
    expected = choices[int(np.argmax(losses))]
    assert Predictor(model, processor, settings=GenerationSettings(decoding="likelihood")).generate(
        [sample], num_visual_tokens=16
    ) == [expected]


def test_choices_are_compared_in_the_form_that_the_prompt_asks_for(
    model: ElasticVLM, processor: Processor, samples: list[Sample]
) -> None:
    sample = dataclasses.replace(samples[1], metadata={"choices": ["red", "blue"], "candidates": ["A", "B"]})
    predictor = Predictor(model, processor, settings=GenerationSettings(decoding="likelihood"))
    assert predictor.generate([sample], num_visual_tokens=16)[0] in ("A", "B")


def test_likelihood_decoding_without_choices_is_refused(
    model: ElasticVLM, processor: Processor, samples: list[Sample]
) -> None:
    with pytest.raises(UserError, match="has no choices, which decoding by likelihood needs"):
        Predictor(model, processor, settings=GenerationSettings(decoding="likelihood")).generate(
            samples[:1], num_visual_tokens=16
        )


def test_answers_have_their_length_and_whether_they_were_cut_off(
    model: ElasticVLM, processor: Processor, samples: list[Sample]
) -> None:
    for limit in (1, 6):
        answers = Predictor(model, processor, settings=GenerationSettings(max_new_tokens=limit)).answer_budgets(
            samples, [16]
        )[16]
        assert all(answer.num_new_tokens == limit for answer in answers if answer.cut_off)
        assert all(1 <= answer.num_new_tokens <= limit for answer in answers)
        assert any(answer.cut_off for answer in answers)


def test_confidence_equals_that_of_one_forward_pass_over_the_answer(
    model: ElasticVLM, processor: Processor, samples: list[Sample]
) -> None:
    sample = samples[1]
    images = [[decode_image(image) for image in sample.images]]
    inputs = processor(images, [sample.prompt], num_visual_tokens=16)
    length = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        tokens_BS = model.generate(**inputs, num_visual_tokens=16, max_new_tokens=3, do_sample=False)
        types_BS = torch.nn.functional.pad(inputs["token_type_ids"], (0, tokens_BS.shape[1] - length), value=1)
        whole = {
            "input_ids": tokens_BS,
            "token_type_ids": types_BS,
            "attention_mask": torch.ones_like(tokens_BS),
            "pixel_values": inputs["pixel_values"],
        }
        logs_SV = model(**whole, num_visual_tokens=16).logits[0].float().log_softmax(-1)
    new_S = tokens_BS[0, length:]
    expected = logs_SV[length - 1 : -1].gather(1, new_S[:, None]).mean()
    # In a batch with others, longer and shorter, and at other budgets.
    answer = Predictor(model, processor, settings=GenerationSettings(max_new_tokens=3)).answer_budgets(
        samples, [BLIND, 16]
    )[16][1]
    assert answer.num_new_tokens == len(new_S)
    assert answer.confidence.mean_log_prob == pytest.approx(float(expected), abs=1e-4)
    assert answer.confidence.entropy == pytest.approx(
        float(-(logs_SV[length - 1].exp() * logs_SV[length - 1]).sum()), abs=1e-4
    )


def test_confidence_of_choices_and_beams(model: ElasticVLM, processor: Processor, samples: list[Sample]) -> None:
    equal_choices = dataclasses.replace(samples[0], metadata={"choices": ["red", "red"]})
    (answer,) = Predictor(model, processor, settings=GenerationSettings(decoding="likelihood")).answer_budgets(
        [equal_choices], [16]
    )[16]
    assert answer.confidence.entropy == pytest.approx(np.log(2), abs=1e-5)
    assert answer.confidence.mean_log_prob is not None
    assert answer.confidence.mean_log_prob < 0
    (answer,) = Predictor(
        model, processor, settings=GenerationSettings(max_new_tokens=3, decoding="beam", num_beams=2)
    ).answer_budgets(samples[:1], [16])[16]
    assert answer.confidence == (None, None)


def test_confidence_of_the_reduced_decoder_equals_that_of_the_stock_model(
    vanilla: tuple[ElasticVLM, ElasticProcessor], samples: list[Sample]
) -> None:
    """FastV that keeps all tokens but one is decoded by our own decoder, and is nearly the same."""
    reduced = GenerationSettings(max_new_tokens=3, reducer='{"type": "fastv", "layer": 1}')
    ours = Predictor(*vanilla, settings=reduced).answer_budgets(samples[:3], [255])[255]
    stock = Predictor(*vanilla, settings=GenerationSettings(max_new_tokens=3)).answer_budgets(samples[:3], [256])[256]
    for one, other in zip(ours, stock, strict=True):
        assert one.confidence.mean_log_prob == pytest.approx(other.confidence.mean_log_prob, rel=0.05)
        assert one.confidence.entropy == pytest.approx(other.confidence.entropy, rel=0.05)


@pytest.fixture(scope="module", params=["paligemma", "clip"])
def vanilla(request: pytest.FixtureRequest, processor: Processor) -> tuple[ElasticVLM, ElasticProcessor]:
    """A model without compression, of each family."""
    model: ElasticVLM
    its_processor: ElasticProcessor = processor
    if request.param == "clip":
        model, its_processor = build_llava(MINI_LLAVA, PROMPTS * 10, None, seed=0)
    else:
        model = build_model(build_config(CONFIG.model_copy(update={"text_layers": 2}), processor), 0)
    model.eval()
    with torch.no_grad():
        model.get_input_embeddings().get_parameter("weight").mul_(0.02)
    return model, its_processor


REDUCERS = [
    '{"type": "cluster_aggregate"}',
    '{"type": "cluster_aggregate", "positions": "image_size_bias"}',
    '{"type": "visionzip"}',
    '{"type": "tome"}',
    '{"type": "saliency", "definition": "last_text", "layer": 0}',
    '{"type": "restore"}',
    '{"type": "fastv", "layer": 1}',
    '{"type": "sparsevlm"}',
]


# Likelihood decoding has two code paths, with and without the reduced decoder; reducers behave the same in both.
BY_LIKELIHOOD = ['{"type": "visionzip"}', '{"type": "restore"}', '{"type": "fastv", "layer": 1}']
CASES = [*((reducer, "greedy") for reducer in REDUCERS), *((reducer, "likelihood") for reducer in BY_LIKELIHOOD)]


@pytest.fixture(scope="module")
def choosing(samples: list[Sample]) -> list[Sample]:
    """Six samples with choices."""
    return [dataclasses.replace(sample, metadata={"choices": ["red", "blue", "47 green"]}) for sample in samples[:6]]


@pytest.fixture(scope="module")
def answer_plainly(
    vanilla: tuple[ElasticVLM, ElasticProcessor], choosing: list[Sample]
) -> Callable[[Decoding], dict[int, list[str]]]:
    """Answers without a reducer, blind and at the full budget."""

    @cache
    def answer(decoding: Decoding) -> dict[int, list[str]]:
        return Predictor(*vanilla, settings=GenerationSettings(max_new_tokens=4, decoding=decoding)).generate_budgets(
            choosing, [BLIND, 256]
        )

    return answer


@pytest.mark.parametrize(("reducer", "decoding"), CASES)
def test_reduced_answers_do_not_depend_on_the_batch(
    vanilla: tuple[ElasticVLM, ElasticProcessor],
    choosing: list[Sample],
    answer_plainly: Callable[[Decoding], dict[int, list[str]]],
    reducer: str,
    decoding: Decoding,
) -> None:
    settings = GenerationSettings(max_new_tokens=4, decoding=decoding, reducer=reducer)
    together = Predictor(*vanilla, batch_size=64, settings=settings).generate_budgets(choosing, [BLIND, 150, 256])
    alone = Predictor(*vanilla, batch_size=1, settings=settings).generate_budgets(choosing, [150])
    assert together[150] == alone[150]
    plain = answer_plainly(decoding)
    assert (together[BLIND], together[256]) == (plain[BLIND], plain[256]), "at the full budget nothing is reduced"
    if decoding == "greedy":
        assert together[150] != together[256]


def test_a_reducer_requires_a_model_without_compression(model: ElasticVLM, processor: Processor) -> None:
    with pytest.raises(UserError, match="and this one has the connector parcel; evaluate it without a reducer"):
        Predictor(model, processor, settings=GenerationSettings(reducer='{"type": "divprune"}'))


def test_beams_and_the_reduced_decoder_exclude_each_other(vanilla: tuple[ElasticVLM, ElasticProcessor]) -> None:
    with pytest.raises(UserError, match="does not support beam search; set decoding to greedy or likelihood"):
        Predictor(*vanilla, settings=GenerationSettings(decoding="beam", num_beams=3, reducer='{"type": "fastv"}'))
