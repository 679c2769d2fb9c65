"""The signals match their names, and are the same from encoded images and from patch features."""

import numpy as np
import pytest

from parcelray.datasets.images import decode_image
from parcelray.datasets.mini.suite import MiniSuite
from parcelray.evaluation.adaptive.budget_signals import ANSWER_SIGNALS, SignalReader, answer_signals, pool
from parcelray.evaluation.scoring.split_scores import GivenAnswer
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.vlm import load_processor, load_vlm


@pytest.fixture(scope="module")
def reader() -> SignalReader:
    folder = resolve_checkpoint("mini_base").path
    return SignalReader(load_vlm(folder).eval(), load_processor(folder), batch_size=3)


def test_signals_are_the_same_from_images_and_from_patch_features(reader: SignalReader) -> None:
    suite = MiniSuite(split="test", image_size=64)
    samples = [suite.get("single", index) for index in range(4)] + [suite.get("video", 0)]
    found = reader.read(samples)
    assert found.shape == (5, len(reader.names))
    assert np.isfinite(found).all()
    assert found[:, -1].tolist() == [1, 1, 1, 1, len(samples[4].images)]
    assert found[:, -2].tolist() == [
        len(ids) for ids in reader._processor.encode_prompts([sample.prompt for sample in samples])
    ]
    for index in (0, 4):
        images = [decode_image(image) for image in samples[index].images]
        pixels = reader._processor.image_processor(images, return_tensors="pt")["pixel_values"]
        pooled = pool(reader._model.model.encode_patches(pixels).detach())
        np.testing.assert_allclose(reader.of(list(pooled), samples[index].prompt), found[index], rtol=1e-4, atol=1e-4)


def test_signals_of_an_answer() -> None:
    found = answer_signals([GivenAnswer("red", num_new_tokens=2, mean_log_prob=-0.5, entropy=1.25)])
    assert found.tolist() == [[-0.5, pytest.approx(np.exp(-0.5)), 1.25, 2.0]]
    assert found.shape[1] == len(ANSWER_SIGNALS)
