"""Attention blocks of the connectors: pre-norm, residual, with GELU (tanh) as in SigLIP.

Each module that owns layers sets their values in `init_weights`, which changes only its direct children and only
through `torch.nn.init`. It can therefore run again on every submodule after a module was created on `meta` and
materialised, and transformers' guards keep it from overwriting loaded weights.

Shape suffixes: B batch, N patches or context tokens, T tokens of self-attention, Q queries, D width, H heads, E width
of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parcelray.config.connector import AttentionConnectorConfig
from parcelray.errors import UserError
from parcelray.models.training_attention import connector_attention


class BlockDims(NamedTuple):
    """The sizes of an attention block."""

    width: int
    num_heads: int
    mlp_width: int
    layer_norm_eps: float


def block_dims(config: AttentionConnectorConfig, *, width: int, mlp_width: int, layer_norm_eps: float) -> BlockDims:
    """Returns the sizes of a block for a configuration and a vision tower.

    Args:
        config: heads and MLP width.
        width: width of the vision tower.
        mlp_width: MLP width of the vision tower, used if the configuration does not set one.
        layer_norm_eps: epsilon of the LayerNorms.

    Raises:
        UserError: the number of heads does not divide the width, or the width is not a multiple of 4.
    """
    if width % config.num_heads:
        raise UserError(
            f"num_heads {config.num_heads} does not divide the vision width {width}; choose a divisor of {width}."
        )
    if width % 4:
        raise UserError(
            f"the vision width {width} is not a multiple of 4, as two-dimensional sine-cosine positions require; use"
            " another vision tower."
        )
    return BlockDims(width, config.num_heads, config.mlp_width or mlp_width, layer_norm_eps)


def sincos_positions(grid_size: int, width: int, *, like: Tensor) -> Tensor:
    """Returns fixed two-dimensional sine-cosine positions of a row-major grid, in patch units.

    A quarter of the channels each encodes sine and cosine of row and column. They are computed on each call, which is
    cheap; a non-persistent buffer would be lost when the module is created on `meta`.

    Returns:
        Positions [grid_size ** 2, width], on the device and in the dtype of `like`.
    """
    steps = torch.arange(grid_size, device=like.device, dtype=torch.float32)
    octaves = torch.arange(width // 4, device=like.device, dtype=torch.float32) / (width // 4)
    angles = steps[:, None] * torch.pow(10_000.0, -octaves)
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows = axis[:, None].expand(grid_size, grid_size, -1)
    columns = axis[None].expand(grid_size, grid_size, -1)
    return torch.cat([rows, columns], dim=-1).reshape(grid_size**2, width).to(like.dtype)


class OutputNorm(nn.LayerNorm):
    """The final LayerNorm of a learned path; it can take the affine parameters of the tower's post_layernorm."""

    def init_weights(self) -> None:
        """Sets gain 1 and bias 0."""
        self.reset_parameters()

    @torch.no_grad()
    def match_scale(self, gain_D: Tensor, bias_D: Tensor | None) -> None:
        """Copies gain and bias, so that the initial tokens have the statistics of the patch features."""
        self.weight.copy_(gain_D)
        self.bias.zero_() if bias_D is None else self.bias.copy_(bias_D)


class LearnedTokens(nn.Module):
    """A table of learned tokens with normally distributed initial values."""

    def __init__(self, num_tokens: int, width: int, *, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_tokens, width))
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the table from torch's global generator."""
        nn.init.normal_(self.weight, std=self.std)


class Attention(nn.Module):
    """Multi-head attention with separate inputs for queries, keys and values, without norm and residual."""

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        self.num_heads = dims.num_heads
        self.q_proj = nn.Linear(dims.width, dims.width)
        self.k_proj = nn.Linear(dims.width, dims.width)
        self.v_proj = nn.Linear(dims.width, dims.width)
        self.out_proj = nn.Linear(dims.width, dims.width)
        self.init_weights()

    def init_weights(self) -> None:
        """Sets Xavier-uniform weights and zero biases.

        Inputs of unit scale then give logits of about unit scale, so heads and queries start with different maps.
        """
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            init_linear(layer)

    def forward(self, queries_BQD: Tensor, keys_BND: Tensor, values_BND: Tensor) -> Tensor:
        """Returns the attended values [B, Q, D]."""
        q_BHQE = self._split_heads(self.q_proj(queries_BQD))
        k_BHNE = self._split_heads(self.k_proj(keys_BND))
        v_BHNE = self._split_heads(self.v_proj(values_BND))
        mixed_BHQE = connector_attention(q_BHQE, k_BHNE, v_BHNE)
        mixed_BQD: Tensor = self.out_proj(mixed_BHQE.transpose(1, 2).flatten(2))
        return mixed_BQD

    def attention_map(self, queries_BQD: Tensor, keys_BND: Tensor) -> Tensor:
        """Returns the attention after softmax, averaged over the heads, [B, Q, N] in float32."""
        q_BHQE = self._split_heads(self.q_proj(queries_BQD)).float()
        k_BHNE = self._split_heads(self.k_proj(keys_BND)).float()
        logits = q_BHQE @ k_BHNE.transpose(-1, -2) * q_BHQE.shape[-1] ** -0.5
        probabilities_BHQN: Tensor = logits.softmax(dim=-1)
        return probabilities_BHQN.mean(dim=1)

    def _split_heads(self, x_BTD: Tensor) -> Tensor:
        batch_size, num_tokens, width = x_BTD.shape
        return x_BTD.view(batch_size, num_tokens, self.num_heads, width // self.num_heads).transpose(1, 2)


class FeedForward(nn.Module):
    """A pre-norm residual MLP with two layers."""

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dims.width, eps=dims.layer_norm_eps)
        self.up_proj = nn.Linear(dims.width, dims.mlp_width)
        self.down_proj = nn.Linear(dims.mlp_width, dims.width)
        self.init_weights()

    def init_weights(self) -> None:
        """Sets Xavier-uniform weights, zero biases, and gain 1 and bias 0 in the norm."""
        self.norm.reset_parameters()
        init_linear(self.up_proj)
        init_linear(self.down_proj)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns x + MLP(norm(x))."""
        update_BTD: Tensor = self.down_proj(F.gelu(self.up_proj(self.norm(x_BTD)), approximate="tanh"))
        return x_BTD + update_BTD


class SelfAttentionBlock(nn.Module):
    """Pre-norm residual self-attention, optionally followed by an MLP."""

    def __init__(self, dims: BlockDims, *, with_mlp: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dims.width, eps=dims.layer_norm_eps)
        self.attention = Attention(dims)
        self.mlp = FeedForward(dims) if with_mlp else nn.Identity()

    def init_weights(self) -> None:
        """Sets gain 1 and bias 0 in the norm."""
        self.norm.reset_parameters()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns the updated tokens [B, T, D]."""
        normed_BTD = self.norm(x_BTD)
        out_BTD: Tensor = self.mlp(x_BTD + self.attention(normed_BTD, normed_BTD, normed_BTD))
        return out_BTD


class CrossAttentionBlock(nn.Module):
    """Pre-norm residual cross-attention from queries to a context, optionally followed by an MLP on the queries.

    Args:
        dims: sizes of the block.
        with_mlp: adds the MLP.
        content_keys: keys are the normed context plus its positions; otherwise only the positions.
    """

    def __init__(self, dims: BlockDims, *, with_mlp: bool, content_keys: bool = True) -> None:
        super().__init__()
        self.content_keys = content_keys
        self.query_norm = nn.LayerNorm(dims.width, eps=dims.layer_norm_eps)
        self.context_norm = nn.LayerNorm(dims.width, eps=dims.layer_norm_eps)
        self.attention = Attention(dims)
        self.mlp = FeedForward(dims) if with_mlp else nn.Identity()

    def init_weights(self) -> None:
        """Sets gain 1 and bias 0 in the norms."""
        self.query_norm.reset_parameters()
        self.context_norm.reset_parameters()

    def forward(self, queries_BQD: Tensor, context_BND: Tensor, positions_ND: Tensor | None = None) -> Tensor:
        """Returns the updated queries [B, Q, D]; the positions are added to the keys only."""
        context_BND = self.context_norm(context_BND)
        keys_BND = self._keys(context_BND, positions_ND)
        attended_BQD = queries_BQD + self.attention(self.query_norm(queries_BQD), keys_BND, context_BND)
        out_BQD: Tensor = self.mlp(attended_BQD)
        return out_BQD

    def attention_map(self, queries_BQD: Tensor, context_BND: Tensor, positions_ND: Tensor | None = None) -> Tensor:
        """Returns the attention after softmax, averaged over the heads, [B, Q, N] in float32."""
        return self.attention.attention_map(
            self.query_norm(queries_BQD), self._keys(self.context_norm(context_BND), positions_ND)
        )

    def _keys(self, normed_BND: Tensor, positions_ND: Tensor | None) -> Tensor:
        if positions_ND is None:
            return normed_BND
        return normed_BND + positions_ND if self.content_keys else positions_ND.expand_as(normed_BND)


def init_linear(layer: nn.Linear) -> None:
    """Sets a Xavier-uniform weight and a zero bias."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
