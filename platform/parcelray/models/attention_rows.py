"""Attention probabilities of a few rows of a decoder layer, which the fused kernels of the layer itself do not give."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half


def attention_rows(
    layer: Any, hidden_BSL: Tensor, rotary: tuple[Tensor, Tensor], mask_B1RS: Tensor, rows: slice
) -> Tensor:
    """What some positions attend to.

    Args:
        layer: a Llama or Gemma layer of transformers.
        hidden_BSL: what enters it.
        rotary: cosines and sines of the positions, [B, S, head width].
        mask_B1RS: added to the logits of the rows.
        rows: which of the positions.

    Returns:
        Probabilities [B, H, R, S] in float32, over the query heads.
    """
    attention = layer.self_attn
    normed_BSL = layer.input_layernorm(hidden_BSL)
    cosines_B1SD, sines_B1SD = (each[:, None] for each in rotary)
    queries_BHRD = attention.q_proj(normed_BSL[:, rows]).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    keys_BGSD = attention.k_proj(normed_BSL).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    queries_BHRD = queries_BHRD * cosines_B1SD[:, :, rows] + rotate_half(queries_BHRD) * sines_B1SD[:, :, rows]
    keys_BGSD = keys_BGSD * cosines_B1SD + rotate_half(keys_BGSD) * sines_B1SD
    keys_BHSD = keys_BGSD.repeat_interleave(attention.num_key_value_groups, dim=1)
    logits_BHRS = queries_BHRD.float() @ keys_BHSD.float().transpose(2, 3) * attention.scaling
    softcap = getattr(attention, "attn_logit_softcapping", None)
    if softcap is not None:
        logits_BHRS = torch.tanh(logits_BHRS / softcap) * softcap
    probabilities: Tensor = (logits_BHRS + mask_B1RS.float()).softmax(dim=3)
    return probabilities
