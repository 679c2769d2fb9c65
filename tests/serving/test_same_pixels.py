"""Every image reaches the vision tower with the same pixels in training, evaluation and serving."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from parcelray.config.evaluate import BLIND
from parcelray.config.serve import HttpConfig, RequestLimits
from parcelray.datasets.collator import Collator
from parcelray.datasets.images import Transparency, decode_image
from parcelray.datasets.sample import Sample
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.mini_llava import build as build_llava
from parcelray.serving.engine.engine import PromptBuilder
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.images import ImageReader
from parcelray.training.step import to_tensors
from tests.datasets.image_cases import CASES, REFUSED, read
from tests.models.conftest import MINI_LLAVA
from tests.serving.http.test_api import data_url
from tests.serving.local import PATIENCE_S

STATUSES = {
    "bomb_20000x20000.png": (413, "image_too_large"),
    "truncated.jpg": (422, "broken_image"),
    "empty.jpg": (422, "broken_image"),
    "animated.gif": (415, "unsupported_image_type"),
    "palette_transparent_color.gif": (415, "unsupported_image_type"),
}
Family = tuple[ElasticVLM, ElasticProcessor]


@pytest.fixture(scope="module", params=["paligemma", "llava"])
def family(request: pytest.FixtureRequest, model: ElasticVLM, processor: ElasticProcessor) -> Family:
    """The packaged model, which resizes to a square, and a LLaVA with random weights, which crops."""
    if request.param == "paligemma":
        return model, processor
    llava, llava_processor = build_llava(MINI_LLAVA, ["what color is the circle"], None, 0)
    return llava.eval(), llava_processor


def _sample(name: str) -> Sample:
    return Sample(
        id=name,
        benchmark="b",
        family="general",
        task="t",
        images=(read(name),),
        prompt="what color is the circle",
        answers=("red",),
    )


def _fitted(family: Family, name: str, transparency: Transparency) -> np.ndarray[Any, Any]:
    """Returns the right pixels at the input size: [H, W, 3]."""
    image = decode_image(read(name), transparency=transparency)
    return np.asarray(family[1].fitted(image))


def _served(family: Family, name: str) -> np.ndarray[Any, Any]:
    """Reads an image as the endpoint does."""
    prompts = PromptBuilder(family[1])
    reader = ImageReader(RequestLimits(), HttpConfig())
    kind = "jpeg" if name.endswith("jpg") else "png"
    (pixels,) = asyncio.run(reader.read(prompts, {"url": data_url(read(name), kind)}, PATIENCE_S))
    return np.frombuffer(pixels.rgb, dtype=np.uint8).reshape(pixels.side, pixels.side, 3)


@pytest.mark.parametrize("name", CASES)
def test_training_and_evaluation_and_serving_have_the_same_pixels(family: Family, name: str) -> None:
    model, processor = family
    expected = _fitted(family, name, "drop")
    batch = Collator(processor)([_sample(name)])
    assert np.array_equal(batch["pixel_values"][0].transpose(1, 2, 0), expected)

    seen: list[torch.Tensor] = []
    handle = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
    )
    try:
        predictor = Predictor(model, processor, settings=GenerationSettings(max_new_tokens=1))
        full = max(model.supported_budgets)
        (answer,) = predictor.answer_budgets([_sample(name)], [full])[full]
    finally:
        handle.remove()
    assert not answer.problem
    trained = to_tensors(batch, torch.device("cpu"), processor).pixel_values_ICHW
    torch.testing.assert_close(seen[0].float(), trained, atol=1e-5, rtol=0)

    if name in STATUSES:
        return
    served = _served(family, name)
    assert np.array_equal(served, _fitted(family, name, "white"))
    if CASES[name].on_white is None:
        assert np.array_equal(served, expected)


@pytest.mark.parametrize("name", STATUSES)
def test_the_endpoint_refuses_as_it_documents(processor: ElasticProcessor, name: str) -> None:
    reader = ImageReader(RequestLimits(), HttpConfig())
    url = {"url": data_url(read(name), "jpeg")}
    with pytest.raises(ApiError) as refused:
        asyncio.run(reader.read(PromptBuilder(processor), url, PATIENCE_S))
    assert (refused.value.status, refused.value.code) == STATUSES[name]


@pytest.mark.parametrize("name", REFUSED)
def test_evaluation_names_the_row_of_a_refused_image(model: ElasticVLM, processor: ElasticProcessor, name: str) -> None:
    predictor = Predictor(model, processor, settings=GenerationSettings(max_new_tokens=1))
    good, bad = predictor.answer_budgets([_sample("bilevel.png"), _sample(name)], [BLIND])[BLIND]
    assert not good.problem
    assert "decoded" in bad.problem or "too many pixels" in bad.problem
