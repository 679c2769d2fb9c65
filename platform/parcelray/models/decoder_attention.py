"""Attention of a decoder over reduced visual tokens: additive masks, and the probabilities of some rows.

Shape suffixes: B prompts, S key positions, R rows (query positions), M tokens to be generated, H query heads,
G key-value heads, D width of a head, L language width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import rotate_half

from parcelray.config.reducer import Positions

_CALIBRATION = 2.0
"""Constant c of RESTORE's calibration (arXiv 2606.01711)."""


class Keys(NamedTuple):
    """The key positions that some layers attend to."""

    valid_BS: Tensor
    """False for padding."""
    positions_BS: Tensor
    """Rotary positions, int64."""
    sizes_BS: Tensor
    """Number of patches in each visual token, int64; 1 for text."""
    visual_BS: Tensor
    """True for visual tokens."""


class LayerMasks(NamedTuple):
    """Masks that are added to the attention logits, one for each kind of layer."""

    full: Tensor
    """Mask of layers with full attention."""
    windowed: Tensor
    """Mask of layers with a sliding window."""

    def of(self, is_windowed: bool) -> Tensor:
        """Returns the mask of one kind of layer."""
        return self.windowed if is_windowed else self.full


class AttentionMasks:
    """Builds the additive attention masks of a decoder over reduced visual tokens.

    With `image_size_bias`, log(size) is added to the logits of a visual token that represents `size` patches. With
    `image_calibrated`, log(size * (c - D(distance))) is added, where D is the mean cosine of the rotary angles over
    that distance (RESTORE, arXiv 2606.01711).

    Args:
        language_model: decoder without its head (Llama, Gemma or Gemma-2), for its rotary frequencies.
        window: width of the sliding window; None for a decoder without such layers.
        positions: see `ReducedDecoder`.
    """

    def __init__(self, language_model: Any, window: int | None, positions: Positions) -> None:
        self._language_model = language_model
        self._window = window
        self._positions = positions

    def of_prompt(self, keys: Keys, prefix_S: Tensor, dtype: torch.dtype) -> LayerMasks:
        """Returns the masks [B, 1, S, S] of a prompt.

        Args:
            keys: the positions of the prompt, which are rows and keys.
            prefix_S: True for positions with bidirectional attention.
            dtype: dtype of the attention logits.
        """
        columns_S = torch.arange(len(prefix_S), device=prefix_S.device)
        bidirectional_SS = prefix_S[:, None] & prefix_S[None, :]
        visible_SS = (columns_S[None, :] <= columns_S[:, None]) | bidirectional_SS
        allowed_BSS = visible_SS[None] & keys.valid_BS[:, None]
        full = self._additive(allowed_BSS, keys.positions_BS, keys, dtype)
        if self._window is None:
            return LayerMasks(full, full)
        # As in transformers, the window does not apply within the bidirectional prefix.
        near_BSS = self._near(keys.positions_BS, keys) | bidirectional_SS
        return LayerMasks(full, self._additive(allowed_BSS & near_BSS, keys.positions_BS, keys, dtype))

    def of_generated(self, positions_BM: Tensor, keys: Keys, dtype: torch.dtype) -> LayerMasks:
        """Returns the masks [B, 1, M, S + M] of M tokens to be generated.

        A mask allows all M new columns in each row: the caller cuts it off after the row's own column.

        Args:
            positions_BM: rotary positions of the new tokens.
            keys: the S positions of the prompt.
            dtype: dtype of the attention logits.
        """
        num_new = positions_BM.shape[1]
        keys = Keys(
            F.pad(keys.valid_BS, (0, num_new), value=True),
            torch.cat([keys.positions_BS, positions_BM], dim=1),
            F.pad(keys.sizes_BS, (0, num_new), value=1),
            F.pad(keys.visual_BS, (0, num_new), value=False),
        )
        return LayerMasks(*(mask.expand(-1, -1, num_new, -1) for mask in self.of_rows(positions_BM, keys, dtype)))

    def of_rows(self, positions_BR: Tensor, keys: Keys, dtype: torch.dtype) -> LayerMasks:
        """Returns the masks [B, 1, R or 1, S] of rows that see every valid key.

        Args:
            positions_BR: rotary positions of the rows.
            keys: the S positions that the rows attend to.
            dtype: dtype of the attention logits.
        """
        allowed_B1S = keys.valid_BS[:, None]
        full = self._additive(allowed_B1S, positions_BR, keys, dtype)
        if self._window is None:
            return LayerMasks(full, full)
        return LayerMasks(full, self._additive(allowed_B1S & self._near(positions_BR, keys), positions_BR, keys, dtype))

    def _near(self, rows_BR: Tensor, keys: Keys) -> Tensor:
        """Returns whether each key lies in the sliding window of each row, bool [B, R, S]."""
        assert self._window is not None
        near_BRS: Tensor = rows_BR[:, :, None] - keys.positions_BS[:, None] < self._window
        return near_BRS

    def _additive(self, allowed_BRS: Tensor, rows_BR: Tensor, keys: Keys, dtype: torch.dtype) -> Tensor:
        distances_BRS = rows_BR[:, :, None] - keys.positions_BS[:, None]
        batch, length = keys.sizes_BS.shape
        bias = torch.zeros(
            distances_BRS.shape if self._positions == "image_calibrated" else (batch, 1, length),
            device=keys.sizes_BS.device,
        )
        if self._positions in ("image_size_bias", "image_calibrated"):
            bias = bias + keys.sizes_BS.clamp(min=1).log()[:, None]
        if self._positions == "image_calibrated":
            decay = rotary_decay(self._language_model, int(distances_BRS.abs().max()))
            calibration = (_CALIBRATION - decay[distances_BRS.abs()]).log()
            bias = bias + calibration.where(keys.visual_BS[:, None], 0.0)
        masked: Tensor = bias.masked_fill(~allowed_BRS, torch.finfo(dtype).min).to(dtype)
        return masked[:, None]


def rotary_decay(language_model: Any, longest: int) -> Tensor:
    """Returns RESTORE's D for the distances 0 to `longest`: the mean cosine of the rotary angles, 1 at distance 0."""
    frequencies = language_model.rotary_emb.inv_freq.float()
    decay: Tensor = (torch.arange(longest + 1, device=frequencies.device)[:, None] * frequencies).cos().mean(dim=1)
    return decay


def attention_rows(
    layer: Any, hidden_BSL: Tensor, rotary: tuple[Tensor, Tensor], mask_B1RS: Tensor, rows: slice
) -> Tensor:
    """Computes the attention probabilities of some rows of a decoder layer, which its fused kernels do not return.

    Args:
        layer: a Llama or Gemma layer of transformers.
        hidden_BSL: input of the layer.
        rotary: cosines and sines of the rotary positions, [B, S, D] each.
        mask_B1RS: added to the attention logits of the rows.
        rows: the rows.

    Returns:
        Probabilities [B, H, R, S] in float32.
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
