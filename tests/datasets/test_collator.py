"""A collated batch with placeholders equals the output of the processor for the same samples."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PaliGemmaProcessor

from parcelray.config.model import MiniLlavaModelConfig, MiniModelConfig
from parcelray.datasets.collator import IGNORED, Collator
from parcelray.datasets.images import decode_image
from parcelray.datasets.mini.suite import MiniSuite
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import BadRowsError
from parcelray.errors import UserError
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor
from parcelray.models.mini import build_processor
from parcelray.models.mini_llava import build_processor as build_llava_processor
from parcelray.training.batches.schedule import BatchSchedule, StepReader, in_process_batches
from parcelray.training.step import TensorBatch, to_tensors, with_placeholders

BUDGET = 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def processor() -> ElasticPaliGemmaProcessor:
    """Processor of the mini model; its tokenizer has few words, so that texts become many tokens."""
    return build_processor(MiniModelConfig(), ["what color is the circle", "how many red blue green 47"] * 20)


def _noise(side: int, seed: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def _sample(prompt: str, answer: str, *, num_images: int = 1, side: int = 64, **changes: object) -> Sample:
    images = tuple(_noise(side, seed) for seed in range(num_images))
    values = {
        "id": prompt,
        "benchmark": "b",
        "family": "f",
        "task": "t",
        "images": images,
        "prompt": prompt,
        "answers": (answer, "another"),
    }
    return Sample(**{**values, **changes})  # type: ignore[arg-type]


def _collate(processor: ElasticPaliGemmaProcessor, samples: list[Sample]) -> TensorBatch:
    return to_tensors(Collator(processor)(samples), CPU, processor)


@pytest.mark.parametrize("num_images", [1, 3])
def test_tokens_types_and_labels_match_the_stock_processor(
    processor: ElasticPaliGemmaProcessor, num_images: int
) -> None:
    texts = [
        ("what color is the circle", "red"),
        ("how many?", "47 <loc0001><loc1023> Circle"),
        ("", "a\nb"),
        ("Ceci n'est pas", " 4, 7"),
    ]
    batch = _collate(processor, [_sample(*text, num_images=num_images) for text in texts])
    stock = PaliGemmaProcessor(processor.image_processor, processor.tokenizer)
    stock.image_seq_length = BUDGET
    inputs = with_placeholders(batch, BUDGET, processor.image_token_id)
    count = num_images * BUDGET
    for row, (prompt, answer) in enumerate(texts):
        images = [decode_image(_noise(64, seed)) for seed in range(num_images)]
        text = processor.image_token * num_images + prompt
        expected = stock(images=[images], text=[text], suffix=[answer], return_tensors="pt")
        length = expected["input_ids"].shape[1]
        for key in ("input_ids", "token_type_ids", "attention_mask"):
            assert torch.equal(inputs[key][row, :length], expected[key][0]), key
        assert torch.equal(batch.labels_BS[row, : length - count], expected["labels"][0, count:])
        assert not inputs["attention_mask"][row, length:].any()
        assert bool((batch.labels_BS[row, length - count :] == IGNORED).all())


@pytest.mark.parametrize("side", [64, 48, 100])
def test_pixels_match_the_image_processor(processor: ElasticPaliGemmaProcessor, side: int) -> None:
    batch = _collate(processor, [_sample("a", "b", num_images=2, side=side)])
    expected = processor.image_processor([decode_image(_noise(side, seed)) for seed in range(2)], return_tensors="pt")[
        "pixel_values"
    ]
    assert batch.pixel_values_ICHW.shape == (2, 3, 64, 64)
    torch.testing.assert_close(batch.pixel_values_ICHW, expected, atol=1e-6, rtol=0)


def test_images_are_in_the_order_of_the_prompts(processor: ElasticPaliGemmaProcessor) -> None:
    samples = [
        _sample("a", "b", images=(_noise(64, 1), _noise(64, 2))),
        _sample("c", "d", images=(_noise(64, 3), _noise(64, 4))),
    ]
    pixels = Collator(processor)(samples)["pixel_values"]
    for index, seed in enumerate((1, 2, 3, 4)):
        assert np.array_equal(pixels[index].transpose(1, 2, 0), np.asarray(decode_image(_noise(64, seed))))


def test_grey_and_transparent_images_become_rgb() -> None:
    assert {decode_image(_noise(64, 0, mode)).mode for mode in ("L", "RGBA", "P")} == {"RGB"}


def _with_a_broken_chunk(png: bytes) -> bytes:
    # Pillow detects an invalid chunk name only while decoding, and raises a SyntaxError.
    start = png.index(b"IDAT")
    return png[: start - 4] + (10).to_bytes(4, "big") + png[start : start + 14] + b"\x00" * 4 + b"\xdd\xa1\xd4C" * 8


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", _noise(64, 0)[:300], _with_a_broken_chunk(_noise(64, 0))],
    ids=["empty", "text", "cut", "chunk"],
)
def test_bytes_that_are_not_an_image_are_rejected(data: bytes) -> None:
    with pytest.raises(UserError, match=rf"An image of {len(data)} bytes cannot be decoded"):
        decode_image(data)


def test_patches_get_the_word_of_their_region_as_label(processor: ElasticPaliGemmaProcessor) -> None:
    regions = [[{"box": [0, 0.25, 0.125, 0.5], "word": "red"}], []]
    samples = [_sample("a", "b", num_images=2, metadata={"regions": regions}), _sample("a", "b", num_images=2)]
    batch = Collator(processor, label_patches=True)(samples)
    red, background = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("red", "."))
    first, second = batch["patch_labels"][0].reshape(2, 16, 16)
    assert bool((first[:2, 4:8] == red).all())
    assert int((first == red).sum()) == 8
    # About as many background patches as region patches are labelled, and one if there are no regions.
    assert 8 <= int((first == background).sum()) <= 16
    assert [int((second == label).sum()) for label in (background, IGNORED)] == [1, 255]
    assert bool((batch["patch_labels"][1] == IGNORED).all())


def test_a_region_smaller_than_a_patch_labels_one_patch(processor: ElasticPaliGemmaProcessor) -> None:
    sample = _sample("a", "b", metadata={"regions": [[{"box": [0.5, 0.5, 0.505, 0.505], "word": "red"}]]})
    labels = Collator(processor, label_patches=True)([sample])["patch_labels"].reshape(16, 16)
    red = processor.tokenizer("red", add_special_tokens=False)["input_ids"][0]
    assert [(int(row), int(column)) for row, column in np.argwhere(labels == red)] == [(8, 8)]


def test_ranks_read_disjoint_parts_of_a_step_and_a_later_start_reads_the_same_batches(
    processor: ElasticPaliGemmaProcessor,
) -> None:
    suite, collator = MiniSuite(split="train"), Collator(processor)
    schedule = BatchSchedule(suite, num_steps=6, images_per_step=8, seed=0)
    whole = StepReader(suite, schedule, collator, 0, 1).read(2)["pixel_values"]
    shares = [StepReader(suite, schedule, collator, rank, 2).read(2)["pixel_values"] for rank in range(2)]
    group = schedule.plan(2).num_images
    prompts = whole.reshape(-1, group, *whole.shape[1:])
    for rank, share in enumerate(shares):
        assert np.array_equal(share.reshape(-1, group, *whole.shape[1:]), prompts[rank::2])
    reader = StepReader(suite, schedule, collator, 0, 1)
    later = list(in_process_batches(reader, 4, 6))
    assert len(later) == 2
    assert all(np.array_equal(later[index]["input_ids"], reader.read(4 + index)["input_ids"]) for index in range(2))


def test_training_and_inference_of_a_llava_use_the_same_pixels_and_tokens() -> None:
    """Uses CLIP's mean and deviation, an image that is scaled and cropped, and placeholders inside of the prompt."""
    processor = build_llava_processor(MiniLlavaModelConfig(), ["what color is the circle red"] * 20)
    processor.image_processor.image_mean, processor.image_processor.image_std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    sample = Sample(
        id="0",
        benchmark="b",
        family="f",
        task="t",
        images=(buffer.getvalue(),),
        prompt="what color is the circle",
        answers=("red",),
        scene="0",
    )
    batch = to_tensors(Collator(processor)([sample]), CPU, processor)
    inputs = with_placeholders(batch, 16, processor.image_token_id)
    expected = processor(images=[[image]], text=[sample.prompt], num_visual_tokens=16)
    # A training batch contains integer grey levels: the tolerance is one level of 255, divided by the deviation.
    assert torch.allclose(inputs["pixel_values"], expected["pixel_values"], atol=1.01 / 255 / 0.26)
    length = expected["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"][:, :length], expected["input_ids"])
    answer = inputs["input_ids"][0, length:].tolist()
    assert answer == processor.encode_answers(["red"])[0]
    assert inputs["token_type_ids"][0].tolist() == [0] * length + [1] * len(answer)


@pytest.mark.parametrize("name", ["truncated.jpg", "empty.jpg"])
def test_all_samples_whose_images_cannot_be_decoded_are_named(
    processor: ElasticPaliGemmaProcessor, repo_root: Path, name: str
) -> None:
    cut = (repo_root / "tests" / "fixtures" / "cases" / "images" / name).read_bytes()
    samples = [
        _sample("a", "1"),
        _sample("b", "2", images=(cut,)),
        _sample("c", "3", images=(_noise(64, 0),)),
        _sample("d", "4", images=(cut,)),
    ]
    with pytest.raises(BadRowsError) as caught:
        Collator(processor)(samples)
    assert list(caught.value.problems) == ["b", "d"]
    assert f"b: An image of {len(cut)} bytes" in str(caught.value)
