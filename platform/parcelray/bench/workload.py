"""The workload of benches: models with random weights at any backbone's shape, and crops of real photographs.

Time and memory of a model do not depend on its weights, so no checkpoint is needed.
"""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from parcelray.models.backbones import (
    ElasticLlavaConfig,
    ElasticLlavaForConditionalGeneration,
    ElasticPaliGemmaConfig,
    ElasticPaliGemmaForConditionalGeneration,
    ElasticVLM,
)
from parcelray.models.vlm import ElasticConfig, config_of, use_sdpa_where_exact
from parcelray.profiling.backbone_shapes import MINI_CONFIG, PRESETS, BackboneShape


def random_model(config: ElasticConfig, device: torch.device) -> ElasticVLM:
    """Builds a model in evaluation mode with seeded random weights, in bf16 on a GPU and in fp32 on a CPU."""
    kind = (
        ElasticLlavaForConditionalGeneration
        if isinstance(config, ElasticLlavaConfig)
        else ElasticPaliGemmaForConditionalGeneration
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        # Built directly in this precision: a 7B model would not fit into memory twice, in float32 and converted.
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = cast(ElasticVLM, kind(config))
        finally:
            torch.set_default_dtype(before)
    torch.nn.Module.train(model, mode=False)
    use_sdpa_where_exact(model)
    return model


def model_config(backbone: str, shape: BackboneShape) -> ElasticConfig:
    """Returns the transformers configuration of a backbone, without a connector.

    Args:
        backbone: a name in `PRESETS`, `mini`, or a checkpoint folder.
        shape: shape of the backbone at the resolution to measure.
    """
    if backbone not in PRESETS:
        config = config_of(MINI_CONFIG.parent if backbone == "mini" else Path(backbone))
        config.connector = None
        config.vision_config.image_size = shape.image_size
        return config
    text = shape.decoder_sizes
    vision = {
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "num_channels": shape.num_channels,
        "hidden_size": shape.vision_width,
        "intermediate_size": shape.vision_mlp_width,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
    }
    if shape.class_tokens:
        return ElasticLlavaConfig(
            vision_config=vision | {"model_type": "clip_vision_model"},
            text_config=text | {"model_type": "llama", "max_position_embeddings": 4096},
            image_token_index=shape.vocab_size - 1,
        )
    return ElasticPaliGemmaConfig(
        vision_config=vision | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text | {"model_type": "gemma2"},
        projection_dim=shape.text_width,
        hidden_size=shape.text_width,
        vocab_size=shape.vocab_size,
        image_token_index=shape.vocab_size - 1,
    )


def photographs(count: int, side: int, seed: int = 0) -> Tensor:
    """Returns random square crops of scikit-learn's two photographs: [count, 3, side, side], values from -1 to 1."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    pictures = load_sample_images().images
    crops = []
    for _ in range(count):
        picture = pictures[rng.integers(len(pictures))]
        top, left = (rng.integers(max(1, picture.shape[axis] - side)) for axis in (0, 1))
        crop = torch.tensor(picture[top : top + side, left : left + side] / 127.5 - 1, dtype=torch.float32).permute(
            2, 0, 1
        )
        if crop.shape[1:] != (side, side):
            crop = torch.nn.functional.interpolate(crop[None], size=(side, side), mode="bilinear")[0]
        crops.append(crop)
    return torch.stack(crops)
