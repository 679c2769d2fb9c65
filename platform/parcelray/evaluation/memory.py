"""Predicts the peak memory of an evaluation worker by simulating its largest batch."""

import torch
from torch import Tensor

from parcelray.models.backbones import ElasticVLM
from parcelray.models.token_counts import count_tokens


def prompt_ids(
    model: ElasticVLM, num_prompts: int, num_images: int, num_visual_tokens: int, num_text_tokens: int
) -> Tensor:
    """Returns token ids [B, S] of prompts of equal length, with the placeholders of their images first."""
    counts = count_tokens(num_text_tokens, num_images, num_visual_tokens)
    ids = torch.zeros((num_prompts, counts.total), dtype=torch.int64)
    ids[:, : counts.visual] = model.config.image_token_id
    return ids


@torch.no_grad()
def run_answers(
    model: ElasticVLM,
    *,
    num_images_per_batch: int,
    num_images: int,
    num_visual_tokens: int,
    num_text_tokens: int,
    image_size: int,
) -> None:
    """Runs the parts of `Predictor` that need the most memory: vision tower, prefill, and one step of generation.

    Args:
        model: model in evaluation mode, possibly without data.
        num_images_per_batch: images per batch of the vision tower and of the decoder.
        num_images: images per prompt.
        num_visual_tokens: budget.
        num_text_tokens: text tokens of the longest prompt and its answer.
        image_size: side of the input images, pixels.
    """
    num_prompts = max(1, num_images_per_batch // num_images)
    pixels_ICHW = torch.empty((num_prompts * num_images, 3, image_size, image_size), dtype=model.dtype)
    features_IND = model.model.encode_patches(pixels_ICHW)
    tokens_IKL = model.model.compress(features_IND, num_visual_tokens=num_visual_tokens)
    ids_BS = prompt_ids(model, num_prompts, num_images, num_visual_tokens, num_text_tokens)
    mask_BS, types_BS = torch.ones_like(ids_BS), torch.zeros_like(ids_BS)
    positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    prefilled = model(
        input_ids=ids_BS,
        attention_mask=mask_BS,
        token_type_ids=types_BS,
        position_ids=positions_BS,
        use_cache=True,
        logits_to_keep=1,
        **model.image_inputs(tokens_IKL),
    )
    one_B1 = ids_BS[:, -1:]
    model(
        input_ids=one_B1,
        attention_mask=torch.cat([mask_BS, torch.ones_like(one_B1)], dim=1),
        token_type_ids=torch.zeros_like(one_B1),
        position_ids=positions_BS[:, -1:] + 1,
        past_key_values=prefilled.past_key_values,
        use_cache=True,
    )
