"""Several turns about one image: one sequence for LLaVA, one prompt per turn over shared features for PaliGemma."""

from pathlib import Path
from typing import Any

import pytest
import torch

from parcelray.config.model import MiniLlavaModelConfig
from parcelray.datasets.collator import IGNORED, Collator
from parcelray.datasets.sample import Sample
from parcelray.models.mini_llava import build_processor as build_llava_processor
from parcelray.models.vlm import load_processor, load_vlm
from parcelray.training.step import losses, to_tensors, with_placeholders
from tests.datasets.conversation_data import picture

CPU = torch.device("cpu")
TURNS = (("how many?", "two"), ("on which side?", "left"))


def _sample(seed: int, later_turns: tuple[tuple[str, str], ...] = (), num_images: int = 1) -> Sample:
    images = tuple(picture(seed + number) for number in range(num_images))
    return Sample(str(seed), "b", "f", "t", images, "what color?", ("red",), later_turns=later_turns)


def test_a_llava_learns_every_answer_of_one_sequence() -> None:
    processor = build_llava_processor(MiniLlavaModelConfig(), ["what color is the circle red two left side"] * 20)
    batch = to_tensors(Collator(processor)([_sample(0, TURNS), _sample(1)]), CPU, processor)
    assert batch.num_prompts == batch.num_samples == 2
    learned = batch.labels_BS[0][batch.labels_BS[0] != IGNORED].tolist()
    assert learned == [token for answer in processor.encode_answers(["red", "two", "left"]) for token in answer]
    text = processor.tokenizer.decode(batch.input_ids_BS[0])
    positions = [text.index(part) for part in ("USER", "what color", "red", "how many", "two", "on which side", "left")]
    assert positions == sorted(positions)
    inputs = with_placeholders(batch, 16, processor.image_token_id)
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 16]


@pytest.mark.parametrize("num_images", [1, 2])
def test_the_turns_of_a_paligemma_share_the_features_of_the_image(tiny_start: dict[str, Any], num_images: int) -> None:
    folder = Path(tiny_start["reference"])
    model, processor = load_vlm(folder), load_processor(folder)
    samples = [_sample(0, num_images=num_images), _sample(5, TURNS, num_images), _sample(9, num_images=num_images)]
    single = [
        Sample(s.id, "b", "f", "t", s.images, question, (answer,))
        for s in samples
        for question, answer in ((s.prompt, s.answers[0]), *s.later_turns)
    ]
    encoded: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    results = []
    for each in (samples, single):
        batch = to_tensors(Collator(processor)(each), CPU, processor)
        assert batch.num_prompts == 5
        parts = [
            losses(model, part, num_visual_tokens=16, image_token_id=processor.image_token_id)
            for part in batch.micro_batches(2)
        ]
        results.append(parts[0].answer_sum + parts[1].answer_sum)
    assert sum(encoded) == num_images * (3 + 5)
    assert torch.isclose(results[0], results[1], rtol=1e-5)
    gradients = torch.autograd.grad(results[0] - results[1], model.model.multi_modal_projector.linear.weight)[0]
    assert float(gradients.abs().max()) < 1e-4


def test_prompts_without_images_can_be_trained_on(tiny_start: dict[str, Any]) -> None:
    folder = Path(tiny_start["reference"])
    model, processor = load_vlm(folder), load_processor(folder)
    batch = to_tensors(Collator(processor)([_sample(0, TURNS, 0), _sample(1, (), 0)]), CPU, processor)
    assert batch.images_per_prompt == 0
    found = losses(model, batch, num_visual_tokens=16, image_token_id=processor.image_token_id)
    assert found.answer_sum.item() > 0
