"""Small elastic models with random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from parcelray.config.connector import ParcelConnectorConfig
from parcelray.config.model import MiniLlavaModelConfig, MiniModelConfig
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor
from parcelray.models.mini import build_config, build_model, build_processor

CONFIG = MiniModelConfig(
    vision_width=32,
    vision_layers=2,
    vision_heads=4,
    vision_mlp_width=64,
    text_width=48,
    text_layers=2,
    text_heads=2,
    text_kv_heads=1,
    text_mlp_width=64,
)
MINI_LLAVA = MiniLlavaModelConfig(
    vision_width=32,
    vision_layers=3,
    vision_heads=4,
    vision_mlp_width=64,
    text_width=48,
    text_layers=3,
    text_heads=2,
    text_kv_heads=1,
    text_mlp_width=64,
)
CORPUS = ["what color is the circle", "how many red blue green 47", "which image has more"] * 20


def random_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Returns images of seeded noise, 64 x 64 pixels."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def write_tower_as_on_the_hub(folder: Path) -> None:
    """Renames the vision tower's weights to the keys of the released checkpoints.

    Later versions of transformers shortened these keys.
    """
    weights = load_file(folder / "model.safetensors")
    old = {key.replace("vision_tower.", "vision_tower.vision_model.", 1): value for key, value in weights.items()}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})


def write_stock_paligemma(
    folder: Path, processor: ElasticPaliGemmaProcessor, dtype: torch.dtype = torch.float32
) -> Path:
    """Writes a stock PaliGemma-2 checkpoint with random weights, in the layout of the hub.

    It has shards, an index, and the key names of the original release.
    """
    values = build_config(CONFIG, processor).to_dict()
    values.pop("connector")
    config = PaliGemmaConfig(
        **{key: value for key, value in values.items() if key not in ("model_type", "architectures")}
    )
    torch.manual_seed(3)
    PaliGemmaForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    write_tower_as_on_the_hub(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: dict[str, dict[str, Tensor]] = {
        "model-00001-of-00002.safetensors": {},
        "model-00002-of-00002.safetensors": {},
    }
    for key, value in weights.items():
        shard = (
            "model-00001-of-00002.safetensors" if key.startswith("vision_tower") else "model-00002-of-00002.safetensors"
        )
        shards[shard][key] = value
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seeds torch's global generator, so that random numbers do not depend on the tests before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def processor() -> ElasticPaliGemmaProcessor:
    """The processor of the mini model."""
    return build_processor(CONFIG, CORPUS)


@pytest.fixture
def elastic(processor: ElasticPaliGemmaProcessor) -> ElasticVLM:
    """A PARCEL model with seeded random weights."""
    config = build_config(CONFIG, processor)
    config.connector = ParcelConnectorConfig(num_heads=4).model_dump(mode="json")
    model = build_model(config, 0)
    model.eval()
    return model
