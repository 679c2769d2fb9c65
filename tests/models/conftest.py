"""A small elastic model with random weights."""

import numpy as np
import pytest
from PIL import Image

from parcelray.config.connector import ParcelConnectorConfig
from parcelray.config.model import MiniModelConfig
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor
from parcelray.models.mini import build_config, build_model, build_processor

CONFIG = MiniModelConfig(
    vision_width=32, vision_layers=2, vision_heads=4, vision_mlp_width=64, text_width=48, text_layers=2, text_heads=2, text_kv_heads=1, text_mlp_width=64
)
CORPUS = ["what color is the circle", "how many red blue green 47", "which image has more"] * 20


def random_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Seeded noise, 64 x 64."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="session")
def processor() -> ElasticPaliGemmaProcessor:
    """Tokenizer and image processor of the mini model."""
    return build_processor(CONFIG, CORPUS)


@pytest.fixture
def elastic(processor: ElasticPaliGemmaProcessor) -> ElasticVLM:
    """A PARCEL model with seeded random weights."""
    config = build_config(CONFIG, processor)
    config.connector = ParcelConnectorConfig(num_heads=4).model_dump(mode="json")
    model = build_model(config, 0)
    model.eval()
    return model
