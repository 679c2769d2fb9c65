"""Rotary positions of visual tokens: expected values, and the same logits wherever a prompt enters the decoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from parcelray.config.connector import ConnectorConfig, M3ConnectorConfig, ParcelConnectorConfig
from parcelray.errors import UserError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.manifest import content_digest
from parcelray.models.mini import build_config, build_model, build_processor, save_checkpoint
from parcelray.models.mini_llava import build
from parcelray.models.positions import image_position_ids
from parcelray.models.reduced_decoder import ReducedDecoder, VisualTokens, encode_prompts
from parcelray.models.vlm import load_vlm
from parcelray.serving.engine.decoder import PooledDecoder, Prompt
from tests.models.conftest import CONFIG, CORPUS, MINI_LLAVA, random_images

PROMPTS = ["what color is the circle", "how many"]
ANSWERS = ["red 47", "blue more"]
IMAGES = [random_images(2, seed) for seed in range(len(PROMPTS))]
TOLERANCE = 2e-4
CELLS = (0, 2, 8, 10)
"""Places of the four cells of 2 x 2 patches in a 4 x 4 grid."""
Model = tuple[ElasticVLM, ElasticProcessor]


def _model(family: str, connector: ConnectorConfig | None, patch_size: int = 4) -> Model:
    values = None if connector is None else connector.model_dump(mode="json")
    model: ElasticVLM
    processor: ElasticProcessor
    if family == "llava":
        model, processor = build(MINI_LLAVA.model_copy(update={"patch_size": patch_size}), CORPUS, values, seed=0)
    else:
        mini = CONFIG.model_copy(update={"patch_size": patch_size})
        processor = build_processor(mini, CORPUS)
        config = build_config(mini, processor)
        config.connector = values
        model = build_model(config, 0)
    model.eval()
    with torch.no_grad():
        # With random weights, attention is nearly uniform, and tied embeddings repeat the last word; both are adjusted.
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
        model.get_input_embeddings().get_parameter("weight").mul_(0.2)
    return model, processor


@contextmanager
def _recorded_positions(model: ElasticVLM) -> Iterator[list[list[list[int]]]]:
    """Records the position ids of each run of the decoder."""
    seen: list[list[list[int]]] = []

    def record(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"].tolist())

    handle = model.model.language_model.layers[0].register_forward_pre_hook(record, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize(
    ("prompt", "first", "places", "expected"),
    [
        pytest.param("vvvvttt", 0, CELLS, [0, 2, 8, 10, 16, 17, 18], id="one image"),
        pytest.param("vvvvttt", 1, CELLS, [1, 3, 9, 11, 17, 18, 19], id="the first position is 1"),
        pytest.param("tvvvvtt", 0, CELLS, [0, 1, 3, 9, 11, 17, 18], id="text before the image"),
        pytest.param("vvvvvvvvt", 0, CELLS, [0, 2, 8, 10, 16, 18, 24, 26, 32], id="two images"),
        pytest.param("vvvvtvvvvt", 0, CELLS, [0, 2, 8, 10, 16, 17, 19, 25, 27, 33], id="text between images"),
        pytest.param("vvvt", 0, (5, 15, 0), [5, 15, 0, 16], id="places that do not ascend"),
        pytest.param("vt", 0, (5,), [5, 16], id="one token"),
        pytest.param("tt", 0, CELLS, [0, 1], id="no image"),
        pytest.param("tt", 0, (), [0, 1], id="contiguous"),
        pytest.param("v" * 16 + "tt", 0, tuple(range(16)), list(range(18)), id="all patches"),
    ],
)
def test_positions_in_a_grid_of_4_x_4_patches(
    prompt: str, first: int, places: tuple[int, ...], expected: list[int]
) -> None:
    contiguous_1S = first + torch.arange(len(prompt))[None]
    is_visual_1S = torch.tensor([[letter == "v" for letter in prompt]])
    assert image_position_ids(contiguous_1S, is_visual_1S, places, 16).tolist() == [expected]


# Two images with four tokens each; then 7 or 4 tokens of text (PaliGemma), or after 8 tokens 19 or 16 (LLaVA).
EXPECTED = {
    ("image", "paligemma"): [
        [1, 3, 9, 11, 17, 19, 25, 27, 33, 34, 35, 36, 37, 38, 39],
        [1, 1, 1, 1, 3, 9, 11, 17, 19, 25, 27, 33, 34, 35, 36],
    ],
    ("image", "llava"): [
        [*range(8), 8, 10, 16, 18, 24, 26, 32, 34, *range(40, 59)],
        [0, 0, 0, *range(8), 8, 10, 16, 18, 24, 26, 32, 34, *range(40, 56)],
    ],
    ("contiguous", "paligemma"): [[*range(1, 16)], [1, 1, 1, *range(1, 13)]],
    ("contiguous", "llava"): [[*range(35)], [0, 0, 0, *range(32)]],
}
"""Position ids of left-padded prompts with a 4 x 4 grid; padding has the first position."""


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize(("positions", "family"), EXPECTED)
def test_generate_counts_on_from_the_places_of_the_images(
    positions: Any, family: str, encoded: bool, num_beams: int
) -> None:
    model, processor = _model(family, M3ConnectorConfig(positions=positions), patch_size=16)
    inputs = dict(processor(images=IMAGES, text=PROMPTS, num_visual_tokens=4))
    inputs["num_visual_tokens"] = 4
    if encoded:
        patches = model.model.encode_patches(inputs.pop("pixel_values"))
        inputs |= model.image_inputs(model.model.compress(patches, num_visual_tokens=inputs.pop("num_visual_tokens")))
    with _recorded_positions(model) as seen:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=num_beams)
    expected = [row for row in EXPECTED[positions, family] for _ in range(num_beams)]
    assert seen == [expected, [[row[-1] + 1] for row in expected], [[row[-1] + 2] for row in expected]]


@pytest.mark.parametrize(("positions", "family"), EXPECTED)
def test_training_has_the_places_of_the_images(positions: Any, family: str) -> None:
    model, processor = _model(family, M3ConnectorConfig(positions=positions), patch_size=16)
    inputs = dict(processor(images=IMAGES, text=PROMPTS, suffix=ANSWERS, num_visual_tokens=4))
    with _recorded_positions(model) as seen:
        model(**inputs, num_visual_tokens=4, use_cache=False)
    length = inputs["input_ids"].shape[1]
    # The longest prompt, and its answer; the shorter prompt has padding at its end.
    prompt = EXPECTED[positions, family][0]
    expected = [*prompt, *range(prompt[-1] + 1, prompt[-1] + 1 + length - len(prompt))]
    assert all(row == expected for row in seen[0])


@pytest.mark.parametrize("family", ["paligemma", "llava"])
def test_all_ways_into_the_decoder_give_the_same_logits(family: str) -> None:
    """Compares training, step-by-step generation, the reduced decoder and the engine, with queries and two images."""
    budget = 20
    model, processor = _model(family, ParcelConnectorConfig(num_heads=4))
    device = torch.device("cpu")
    with torch.inference_mode():
        pixels = processor.pixel_values([image for group in IMAGES for image in group])
        tokens_IKL = model.model.compress(model.model.encode_patches(pixels), num_visual_tokens=budget)
        images = model.image_inputs(tokens_IKL)
        answers = processor.encode_answers(ANSWERS)
        num_new = min(map(len, answers))
        inputs = processor.prompts(PROMPTS, 2, num_visual_tokens=budget, answers=ANSWERS)
        logits_BSV = model(**inputs, **images, use_cache=False).logits
        starts = inputs["token_type_ids"].argmax(1).tolist()
        trained = torch.stack(
            [row[start - 1 : start - 1 + num_new] for row, start in zip(logits_BSV, starts, strict=True)]
        )

        prompts = encode_prompts(processor, PROMPTS, ANSWERS, device)
        places = torch.tensor(model.token_places(budget))
        position_ids = torch.cat([places, places + 256]).expand(len(PROMPTS), -1)
        visual = VisualTokens(
            tokens_IKL.unflatten(0, (-1, 2)).flatten(1, 2), position_ids, torch.ones_like(position_ids)
        )
        longest = max(map(len, answers))
        reduced = ReducedDecoder(model, "image").logits(prompts, visual)[:, -longest - 1 :][:, :num_new]

        prompt_inputs = processor.prompts(PROMPTS, 2, num_visual_tokens=budget)
        length = prompt_inputs["input_ids"].shape[1]
        generated = model.generate(
            **prompt_inputs,
            **images,
            max_new_tokens=num_new,
            prefix_allowed_tokens_fn=lambda row, ids: [answers[row][len(ids) - length]],
            return_dict_in_generate=True,
            output_logits=True,
        ).logits

        decoder = PooledDecoder(model, max_tokens=512)
        texts = processor.encode_prompts(PROMPTS)
        lengths = [len(ids) + 2 * budget for ids in texts]
        blocks = [decoder.pool.reserve(decoder.kv_lengths(each + num_new, 0, 0)) for each in lengths]
        logits_BV, spans = decoder.prefill(
            [
                Prompt(tuple(ids), processor.visual_offset, visual_VL, budget, own)
                for ids, visual_VL, own in zip(texts, visual.tokens_BVL, blocks, strict=True)
            ]
        )
        served = [logits_BV]
        for step in range(num_new - 1):
            logits_BV = decoder.decode([ids[step] for ids in answers], spans, blocks)
            served.append(logits_BV)
    for result in (reduced, torch.stack(generated, dim=1), torch.stack(served, dim=1)):
        torch.testing.assert_close(result, trained, rtol=0, atol=TOLERANCE)
    contiguous, _ = _model(family, ParcelConnectorConfig(num_heads=4, positions="contiguous"))
    with torch.inference_mode():
        assert (contiguous(**inputs, **images, use_cache=False).logits - logits_BSV).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["paligemma", "llava"])
def test_all_patches_in_raster_order_have_the_positions_of_the_stock_model(family: str) -> None:
    stock, processor = _model(family, None)
    pooled, _ = _model(family, M3ConnectorConfig(positions="image"))
    inputs = dict(processor(images=IMAGES, text=PROMPTS))
    greedy = {"max_new_tokens": 4, "do_sample": False}
    with torch.inference_mode():
        assert torch.equal(pooled(**inputs).logits, stock(**inputs).logits)
    assert torch.equal(pooled.generate(**inputs, **greedy), stock.generate(**inputs, **greedy))


@pytest.mark.parametrize("family", ["paligemma", "llava"])
def test_jumps_in_the_positions_do_not_divide_a_prompt_without_a_mask(family: str) -> None:
    """Without a mask and a cache, transformers takes such jumps for the ends of packed sequences."""
    model, processor = _model(family, M3ConnectorConfig(positions="image"))
    inputs = dict(processor(images=IMAGES[:1], text=PROMPTS[:1], num_visual_tokens=16))
    with torch.inference_mode():
        expected = model(**inputs, num_visual_tokens=16, use_cache=False).logits
        del inputs["attention_mask"]
        result = model(**inputs, num_visual_tokens=16, use_cache=False).logits
        by_embeddings = model(
            inputs_embeds=model.get_input_embeddings()(inputs.pop("input_ids")),
            **inputs,
            num_visual_tokens=16,
            use_cache=False,
        ).logits
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(by_embeddings, expected, rtol=0, atol=TOLERANCE)


def test_positions_that_cannot_be_known_or_do_not_exist_are_refused() -> None:
    model, processor = _model("paligemma", M3ConnectorConfig(positions="image"))
    inputs = dict(processor(images=IMAGES, text=PROMPTS, num_visual_tokens=16))
    with torch.inference_mode():
        cache = model(**inputs, num_visual_tokens=16, use_cache=True).past_key_values
        with pytest.raises(UserError, match="pass position_ids"):
            model(input_ids=torch.ones(2, 1, dtype=torch.int64), past_key_values=cache)
        model.config.text_config.max_position_embeddings = 512
        with pytest.raises(UserError, match="needs 519 positions"):
            model(**inputs, num_visual_tokens=16)


def test_positions_are_part_of_a_checkpoint_and_of_its_digest(tmp_path: Path) -> None:
    """The digest is in every prediction key, so predictions with other positions are computed anew."""
    digests = set()
    for positions in ("image", "contiguous"):
        model, processor = _model("paligemma", M3ConnectorConfig(positions=positions))
        save_checkpoint(model, processor, tmp_path / positions)
        assert load_vlm(tmp_path / positions).has_image_positions == (positions == "image")
        digests.add(content_digest(tmp_path / positions))
    assert len(digests) == 2
