"""The attention of prompt words to the visual tokens in the decoder, for several prompts per image.

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
    """Attention maps and token properties of each image."""

    last_word_IPLHN: Floats
    """Attention of the last word of each prompt."""
    mean_word_IPLHN: Floats
    """Attention, averaged over the words of each prompt."""
    class_attention_IN: Floats | None
    """Attention in the vision tower; None: the tower has no attention."""
    tokens_INW: Floats
    """Projected visual tokens, as they enter the decoder."""
    contrast_IN: Floats
    """Standard deviation of the pixels of each patch."""
    grid_size: int
    """Side of the token grid."""


@torch.inference_mode()
def attention_maps(
    model: ElasticVLM, processor: ElasticProcessor, images: Sequence[Image.Image], prompts: Sequence[Sequence[str]]
) -> AttentionMaps:
    """Measures the attention maps of images, with all prompts of an image in one batch.

    Args:
        model: model without compression, in evaluation mode.
        processor: processor of the same checkpoint.
        images: RGB images.
        prompts: prompts of each image, the same number for all images.

    Raises:
        UserError: the connector compresses, or the images have different numbers of prompts.
    """
    if model.connector.name != "identity":
        raise UserError(
            f"The model has the connector {model.connector.name}, but attention maps need a model without"
            " compression; give the base model."
        )
    if len({len(each) for each in prompts}) != 1 or len(prompts) != len(images):
        raise UserError(
            f"{len(images)} images have {sorted({len(each) for each in prompts})} prompts each; give every image the"
            " same number of prompts."
        )
    device = next(model.parameters()).device
    decoder = ReducedDecoder(model)
    layers = list(range(decoder.num_layers))
    last, mean, classes, tokens, contrast = [], [], [], [], []
    for image, questions in zip(images, prompts, strict=True):
        pixels = processor.pixel_values([image]).to(device, model.dtype)
        view = EncoderView(model.model, pixels)
        full_1NL = view.project(view.patch_features_IND)
        count = full_1NL.shape[1]
        position_ids = torch.arange(count, device=device).expand(len(questions), -1)
        text = encode_prompts(processor, list(questions), None, device)
        visual = VisualTokens(full_1NL.expand(len(questions), -1, -1), position_ids, torch.ones_like(position_ids))
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
