"""Tests that the continuous engine generates the same tokens as transformers' `generate`, in mixed batches."""

import random
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from parcelray.config.connector import ParcelConnectorConfig
from parcelray.config.serve import EngineConfig
from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.mini import build_config, build_model, build_processor
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import EngineStats, answer_all
from tests.models.conftest import CONFIG, CORPUS
from tests.serving.conftest import Asker

CAPS = (1, 2, 4, 8, 16, 32, 64)
CLEAR = 1e-3
"""Minimum difference of the two largest logits for a token to be compared.

Rounding depends on kernels and batches and is below 1e-4; closer tokens may be swapped by it.
"""
BUDGETS = (0, 16, 64, 256)
pytestmark = pytest.mark.usefixtures("never_ending")


@torch.inference_mode()
def generated(
    model: ElasticVLM, processor: ElasticProcessor, samples: Sequence[Sample], budget: int, length: int
) -> list[Tensor]:
    """Returns the greedy token ids of each sample up to the first unclear one; the end token does not end an answer."""
    found: dict[int, Tensor] = {}
    for count in {len(sample.images) if budget else 0 for sample in samples}:
        group = [index for index, sample in enumerate(samples) if not budget or len(sample.images) == count]
        inputs = dict(processor.prompts([samples[index].prompt for index in group], count, num_visual_tokens=budget))
        if count:
            pictures = [decode_image(image) for index in group for image in samples[index].images]
            pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            inputs |= model.image_inputs(
                model.model.compress(model.model.encode_patches(pixels), num_visual_tokens=budget)
            )
        made = model.generate(
            **inputs,
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=-1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best_BT2 = torch.stack(made.logits, dim=1).topk(2).values
        clear_BT = best_BT2[..., 0] - best_BT2[..., 1] > CLEAR
        lengths = clear_BT.long().cumprod(dim=1).sum(dim=1).tolist()
        ids_BT = made.sequences[:, inputs["input_ids"].shape[1] :]
        found |= {index: ids_T[:clear] for index, ids_T, clear in zip(group, ids_BT, lengths, strict=True)}
    return [found[index] for index in range(len(samples))]


def compare(
    model: ElasticVLM, processor: ElasticProcessor, samples: Sequence[Sample], caps: Sequence[int]
) -> EngineStats:
    """Compares all samples at all budgets, in random order, each with one of the lengths."""
    rng = random.Random(0)
    plain = {budget: generated(model, processor, samples, budget, max(caps)) for budget in BUDGETS}
    drawn = [(index, budget, rng.choice(caps)) for index in range(len(samples)) for budget in BUDGETS]
    mixed = [
        (index, budget, min(cap, len(plain[budget][index])))
        for index, budget, cap in drawn
        if len(plain[budget][index])
    ]
    assert sum(cap for *_, cap in mixed) > 0.7 * sum(cap for *_, cap in drawn), "most tokens are clear"
    rng.shuffle(mixed)
    asker = Asker(processor)
    engine = ContinuousEngine(
        model, processor, EngineConfig(max_running=24, max_waiting=256, kv_tokens=8192, vision_batch=16)
    )
    requests = [asker(samples[index], budget, max_new_tokens=cap) for index, budget, cap in mixed]
    answers = answer_all(engine, requests)
    stats = engine.stats()
    engine.close()
    for (index, budget, cap), each in zip(mixed, answers, strict=True):
        offline = processor.tokenizer.decode(plain[budget][index][:cap], skip_special_tokens=True).strip()
        assert (each.text, each.num_new_tokens, each.reason) == (offline, cap, "length"), (index, budget)
    assert len({each.text for each in answers}) > len(mixed) / 4, "the test is meaningful only if answers differ"
    assert stats.decoded_rows > 4 * stats.steps
    # Every image was encoded once, although there are several budgets and questions.
    assert stats.feature_cache_misses == len({image.content for request in requests for image in request.images})
    assert (stats.kv_tokens_used, stats.running, stats.waiting) == (0, 0, 0)
    return stats


def test_mixed_requests_equal_offline_generation(
    model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample]
) -> None:
    compare(model, processor, samples[::5], (1, 2, 4, 8, 16))


@pytest.mark.nightly
def test_two_hundred_mixed_requests_equal_offline_generation(
    model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample]
) -> None:
    stats = compare(model, processor, samples, CAPS)
    assert stats.prefilled > 180


@pytest.mark.parametrize("kind", ["parcel", "soft_capped", "sliding_window"])
def test_other_architectures_equal_offline_generation(kind: str, samples: list[Sample]) -> None:
    """Covers queries and routing, soft-capped logits (eager attention), and a window shorter than most prompts.

    The visual tokens have the positions of their places in the image, except with soft-capped logits.
    """
    processor = build_processor(CONFIG, [*CORPUS, *(sample.prompt for sample in samples)])
    config = build_config(CONFIG.model_copy(update={"text_layers": 4}), processor)
    positions: Literal["contiguous", "image"] = "contiguous" if kind == "soft_capped" else "image"
    config.connector = ParcelConnectorConfig(num_heads=4, positions=positions).model_dump(mode="json")
    if kind == "soft_capped":
        config.text_config.attn_logit_softcapping, config.text_config.final_logit_softcapping = 5.0, 2.0
        config._attn_implementation = "eager"
    if kind == "sliding_window":
        config.text_config.sliding_window = 32
    # With this seed, 84 to 87 % of the tokens are clear.
    model = build_model(config, 1)
    model.eval()
    with torch.no_grad():
        # With random weights, attention is nearly uniform, and tied embeddings repeat the last word.
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
        model.get_input_embeddings().get_parameter("weight").mul_(0.2)
    compare(model, processor, samples[::4], (1, 8, 24))
