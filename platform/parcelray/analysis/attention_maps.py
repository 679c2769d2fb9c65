"""Attention of a decoder's words to the visual tokens, for several prompts about each of some images.

Shapes: I images, P prompts, L layers, H heads, N visual tokens, W width of the projected tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from parcelray.errors import UserError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.reduced_decoder import ReducedDecoder, VisualTokens, encode_prompts
from parcelray.models.token_reduction.encoder_view import EncoderView

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class AttentionMaps:
    """What was measured on each image."""

    last_word_IPLHN: Floats
    """Attention of each prompt's last word."""
    mean_word_IPLHN: Floats
    """Mean over the words of each prompt."""
    class_attention_IN: Floats | None
    """What the vision tower looks at; None: a tower without attention."""
    tokens_INW: Floats
    """Projected visual tokens."""
    contrast_IN: Floats
    """Standard deviation of the pixels of each patch."""
    grid_size: int


@torch.inference_mode()
def attention_maps(
    model: ElasticVLM, processor: ElasticProcessor, images: Sequence[Image.Image], prompts: Sequence[Sequence[str]]
) -> AttentionMaps:
    """Measures one image after the other, all its prompts at once.

    Args:
        model: without compression, in evaluation mode.
        processor: of the same checkpoint.
        images: RGB.
        prompts: of each image as many.

    Raises:
        UserError: the model has a connector that compresses, or the images have different numbers of prompts.
    """
    if model.connector.name != "identity":
        raise UserError(
            f"Attention maps need a model without compression, and this one has the connector {model.connector.name};"
            " give its vanilla base."
        )
    if len({len(each) for each in prompts}) != 1 or len(prompts) != len(images):
        raise UserError(
            f"{len(images)} images have {sorted({len(each) for each in prompts})} prompts each; give every image as"
            " many."
        )
    device = next(model.parameters()).device
    decoder = ReducedDecoder(model)
    layers = list(range(decoder.num_layers))
    last, mean, classes, tokens, contrast = [], [], [], [], []
    for image, asked in zip(images, prompts, strict=True):
        pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"].to(device, model.dtype)
        view = EncoderView(model.model, pixels)
        full_1NL = view.project(view.patch_features_IND)
        count = full_1NL.shape[1]
        position_ids = torch.arange(count, device=device).expand(len(asked), -1)
        text = encode_prompts(processor, list(asked), None, device)
        visual = VisualTokens(full_1NL.expand(len(asked), -1, -1), position_ids, torch.ones_like(position_ids))
        maps_LPHTN = torch.stack(decoder.attention(text, visual, layers)).float()
        valid = text.valid_BT[None, :, None, :, None]
        last.append(maps_LPHTN[:, :, :, -1].transpose(0, 1).cpu().numpy())
        mean.append(((maps_LPHTN * valid).sum(3) / valid.sum(3)).transpose(0, 1).cpu().numpy())
        tokens.append(full_1NL[0].float().cpu().numpy())
        contrast.append(_contrast(pixels[0].float().cpu(), model.config.grid_size))
        if model.model.feature_layer is not None:
            classes.append(view.attention_IHN.sum(1)[0].cpu().numpy())
    return AttentionMaps(
        np.stack(last),
        np.stack(mean),
        np.stack(classes) if classes else None,
        np.stack(tokens),
        np.stack(contrast),
        int(model.config.grid_size),
    )


def _contrast(pixels_CHW: torch.Tensor, grid: int) -> Floats:
    side = pixels_CHW.shape[1] // grid
    patches = (
        pixels_CHW.mean(0)[: grid * side, : grid * side]
        .reshape(grid, side, grid, side)
        .permute(0, 2, 1, 3)
        .reshape(grid * grid, -1)
    )
    return np.asarray(patches.std(1).numpy(), dtype=np.float32)
