"""Small models of both families with random weights, and runs of their vision towers."""

import pytest
import torch
from torch import Tensor

from parcelray.config.model import MiniLlavaModelConfig
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.mini import build_config, build_model
from parcelray.models.mini_llava import build
from parcelray.models.token_reduction.encoder_view import EncoderView

from ..conftest import CONFIG, CORPUS, MINI_LLAVA, random_images

Model = tuple[ElasticVLM, ElasticProcessor]


@pytest.fixture(scope="session")
def models(processor: ElasticProcessor) -> dict[str, Model]:
    """`paligemma` (no class token, features after the last norm), and LLaVA with each kind of tower."""
    paligemma = build_model(build_config(CONFIG, processor), 0).eval()  # type: ignore[arg-type]
    result: dict[str, Model] = {"paligemma": (paligemma, processor)}
    for tower in ("clip", "siglip", "convnext"):
        model, its_processor = build(
            MiniLlavaModelConfig(**MINI_LLAVA.model_dump() | {"tower": tower}), CORPUS, None, seed=0
        )
        result[tower] = (model.eval(), its_processor)
    return result


@pytest.fixture(scope="session")
def views(models: dict[str, Model]) -> dict[str, EncoderView]:
    """Runs of each vision tower over three images."""
    with torch.no_grad():
        return {name: EncoderView(model.model, pixels(processor)) for name, (model, processor) in models.items()}


def pixels(processor: ElasticProcessor, count: int = 3) -> Tensor:
    """Returns normalised pixels of seeded images."""
    values: Tensor = processor.image_processor(random_images(count), return_tensors="pt")["pixel_values"]
    return values


def projected(view: EncoderView) -> Tensor:
    """Returns all visual tokens, projected."""
    with torch.no_grad():
        return view.project(view.patch_features_IND)
