"""Attention blocks of the connectors: pre-norm, residual, with GELU (tanh) as in SigLIP.

Each module with weights of its own sets them in `init_weights`, only through `torch.nn.init`. It can therefore run again
after a module was created on `meta` and materialised, and transformers' guards keep it from overwriting loaded weights.

Shape suffixes: B batch, N patches or context tokens, T tokens of self-attention, Q queries, D width, H heads, E width
of a head.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parcelray.config.connector import AttentionConnectorConfig
from parcelray.errors import UserError
from parcelray.models.training_attention import connector_attention

OWN_PLACE_LOGIT = 24.0
"""Logit of a query with the patch at its own place at the local start, less the part of the content.

A query then begins as a local average: of 16 x 16 patches with heads of width 16, its own patch has about 0.9 of the
attention. Weaker and stronger starts were worse.
"""
_LOCAL_CONTENT_GAIN = 0.1


class BlockDims(NamedTuple):
    """The sizes of an attention block, and how the query path that it belongs to starts."""

    width: int
    num_heads: int
    mlp_width: int
    layer_norm_eps: float
    local: bool = False
    """Whether the query path has the local start."""


def block_dims(config: AttentionConnectorConfig, *, width: int, mlp_width: int, layer_norm_eps: float) -> BlockDims:
    """Returns the sizes of a block for a configuration and a vision tower.

    Args:
        config: heads and MLP width.
        width: width of the vision tower.
        mlp_width: MLP width of the vision tower, used if the configuration does not set one.
        layer_norm_eps: epsilon of the LayerNorms.

    Raises:
        UserError: the number of heads does not divide the width, the width is not a multiple of 4, or the heads are
            too narrow for the local start.
    """
    local = getattr(config, "start", "random") == "local"
    if width % config.num_heads:
        raise UserError(
            f"num_heads {config.num_heads} does not divide the vision width {width}; choose a divisor of {width}."
        )
    if width % 4:
        raise UserError(
            f"the vision width {width} is not a multiple of 4, as two-dimensional sine-cosine positions require; use"
            " another vision tower."
        )
    if local and width // config.num_heads < 4:
        raise UserError(
            f"num_heads {config.num_heads} gives heads of width {width // config.num_heads}, but the local start needs"
            f" at least 4; set num_heads to at most {width // 4}, or start to random."
        )
    return BlockDims(width, config.num_heads, config.mlp_width or mlp_width, layer_norm_eps, local)


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


def place_code(places: Sequence[int], grid_size: int, dims: BlockDims, *, like: Tensor) -> Tensor:
    """Returns the code of places in a patch grid for the local start, the same in every head.

    Half of the channels of a head encode the row, half the column: sine and cosine of pi k x / G for the odd k below
    the grid side G. A wide head repeats the frequencies, a narrow head has the lowest ones, and up to three channels
    are left at 0. The factor makes the product of a code with itself `OWN_PLACE_LOGIT` after the scaling of attention,
    in heads of every width.

    Args:
        places: raster indices.
        grid_size: side G of the patch grid.
        dims: width and heads.
        like: gives the device.

    Returns:
        Codes [places, width] in float32.
    """
    head_width = dims.width // dims.num_heads
    count = head_width // 4
    odd = torch.arange(1, max(2, grid_size), 2, device=like.device, dtype=torch.float32)
    frequencies = odd.repeat(math.ceil(count / len(odd)))[:count]
    index_T = torch.tensor(places, device=like.device)
    parts = []
    for line_T in (index_T // grid_size, index_T % grid_size):
        angles = line_T[:, None] * frequencies * (math.pi / grid_size)
        parts += [angles.sin(), angles.cos()]
    factor = math.sqrt(OWN_PLACE_LOGIT * math.sqrt(head_width) / (2 * count))
    code_TE = F.pad(factor * torch.cat(parts, dim=-1), (0, head_width - 4 * count))
    return code_TE.repeat(1, dims.num_heads)


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
    """A table of learned tokens with normally distributed initial values.

    Args:
        num_tokens: number of tokens.
        width: width of a token.
        std: standard deviation of the initial values.
        decays: whether weight decay applies to the table.
    """

    def __init__(self, num_tokens: int, width: int, *, std: float, decays: bool = True) -> None:
        super().__init__()
        self.std = std
        self.no_weight_decay = () if decays else ("weight",)
        self.weight = nn.Parameter(torch.empty(num_tokens, width))
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the table from torch's global generator."""
        nn.init.normal_(self.weight, std=self.std)


class PlaceCode(nn.Module):
    """The codes that queries and keys have for their places at the local start, see `place_code`.

    Those of the keys are fixed. Those of the queries are learned: the parameter is the difference to the code of the
    query's place, and weight decay does not apply to it.
    """

    no_weight_decay = ("offset",)

    def __init__(self, places: Sequence[int], grid_size: int, dims: BlockDims) -> None:
        super().__init__()
        self.places = tuple(places)
        self.grid_size = grid_size
        self.dims = dims
        self.offset = nn.Parameter(torch.empty(len(places), dims.width))
        self.init_weights()

    def init_weights(self) -> None:
        """Starts every query at its place."""
        nn.init.zeros_(self.offset)

    def forward(self, num_queries: int) -> tuple[Tensor, Tensor]:
        """Returns the codes of the first queries, [num_queries, D], and of all patches, [N, D]."""
        queries_QD = place_code(self.places[:num_queries], self.grid_size, self.dims, like=self.offset)
        keys_ND = place_code(range(self.grid_size**2), self.grid_size, self.dims, like=self.offset)
        return queries_QD + self.offset[:num_queries], keys_ND


class Projection(nn.Linear):
    """A linear layer with its own initial values.

    A module above it could not set them: on loading a checkpoint, transformers initialises only modules that have
    weights of their own, and every `nn.Linear` as the decoder's.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        start: initial weight. `xavier`: Xavier-uniform; `small`: that times 0.1; `identity`: input = output; `zero`.
            The bias is zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        start: Literal["xavier", "small", "identity", "zero"] = "xavier",
    ) -> None:
        self.start = start
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Called by the constructor of `nn.Linear`."""
        self.init_weights()

    def init_weights(self) -> None:
        """Sets the initial values.

        Xavier-uniform weights give logits of about unit scale for inputs of unit scale, so heads and queries start with
        different maps.
        """
        if self.start == "identity":
            nn.init.eye_(self.weight)
        elif self.start == "zero":
            nn.init.zeros_(self.weight)
        else:
            nn.init.xavier_uniform_(self.weight, _LOCAL_CONTENT_GAIN if self.start == "small" else 1.0)
        nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Multi-head attention with separate inputs for queries, keys and values, without norm and residual.

    Args:
        dims: sizes of the block.
        start: initial values. `random`: all projections random; `local`: small projections of queries and keys, so that
            added codes decide, and values that pass unchanged; `closed`: as `random`, but without output.
    """

    def __init__(self, dims: BlockDims, start: Literal["random", "local", "closed"] = "random") -> None:
        super().__init__()
        self.num_heads = dims.num_heads
        content: Literal["small", "xavier"] = "small" if start == "local" else "xavier"
        self.q_proj = Projection(dims.width, dims.width, content)
        self.k_proj = Projection(dims.width, dims.width, content)
        self.v_proj = Projection(dims.width, dims.width, "identity" if start == "local" else "xavier")
        self.out_proj = Projection(
            dims.width, dims.width, "identity" if start == "local" else "zero" if start == "closed" else "xavier"
        )

    def forward(
        self, queries_BQD: Tensor, keys_BND: Tensor, values_BND: Tensor, codes: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Returns the attended values [B, Q, D].

        Args:
            queries_BQD: input of the queries.
            keys_BND: input of the keys.
            values_BND: input of the values.
            codes: codes of the queries, [Q, D], and of the keys, [N, D], which are added to their projections.
        """
        q_BHQE, k_BHNE = self._queries_and_keys(queries_BQD, keys_BND, codes)
        v_BHNE = self._split_heads(self.v_proj(values_BND))
        mixed_BHQE = connector_attention(q_BHQE, k_BHNE, v_BHNE)
        mixed_BQD: Tensor = self.out_proj(mixed_BHQE.transpose(1, 2).flatten(2))
        return mixed_BQD

    def attention_map(
        self, queries_BQD: Tensor, keys_BND: Tensor, codes: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Returns the attention after softmax, averaged over the heads, [B, Q, N] in float32."""
        q_BHQE, k_BHNE = (x_BHTE.float() for x_BHTE in self._queries_and_keys(queries_BQD, keys_BND, codes))
        logits = q_BHQE @ k_BHNE.transpose(-1, -2) * q_BHQE.shape[-1] ** -0.5
        probabilities_BHQN: Tensor = logits.softmax(dim=-1)
        return probabilities_BHQN.mean(dim=1)

    def _queries_and_keys(
        self, queries_BQD: Tensor, keys_BND: Tensor, codes: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        q_BQD, k_BND = self.q_proj(queries_BQD), self.k_proj(keys_BND)
        if codes is not None:
            q_BQD, k_BND = q_BQD + codes[0].to(q_BQD.dtype), k_BND + codes[1].to(k_BND.dtype)
        return self._split_heads(q_BQD), self._split_heads(k_BND)

    def _split_heads(self, x_BTD: Tensor) -> Tensor:
        batch_size, num_tokens, width = x_BTD.shape
        return x_BTD.view(batch_size, num_tokens, self.num_heads, width // self.num_heads).transpose(1, 2)


class FeedForward(nn.Module):
    """A pre-norm residual MLP with two layers; at the local start, it begins without output."""

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dims.width, eps=dims.layer_norm_eps)
        self.up_proj = Projection(dims.width, dims.mlp_width)
        self.down_proj = Projection(dims.mlp_width, dims.width, "zero" if dims.local else "xavier")

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns x + MLP(norm(x))."""
        update_BTD: Tensor = self.down_proj(F.gelu(self.up_proj(self.norm(x_BTD)), approximate="tanh"))
        return x_BTD + update_BTD


class SelfAttentionBlock(nn.Module):
    """Pre-norm residual self-attention, optionally followed by an MLP; at the local start, it begins as identity."""

    def __init__(self, dims: BlockDims, *, with_mlp: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dims.width, eps=dims.layer_norm_eps)
        self.attention = Attention(dims, "closed" if dims.local else "random")
        self.mlp = FeedForward(dims) if with_mlp else nn.Identity()

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
        conditions: whether the block conditions the queries, as one before the path's own cross-attention. At the local
            start, such a block begins as identity; the path's own has the context itself as values, not normed.
    """

    def __init__(self, dims: BlockDims, *, with_mlp: bool, content_keys: bool = True, conditions: bool = False) -> None:
        super().__init__()
        self.raw_values = dims.local and not conditions
        self.content_keys = content_keys
        self.query_norm = nn.LayerNorm(dims.width, eps=dims.layer_norm_eps)
        # Nothing would use the norm if neither values nor keys have the normed context.
        is_used = content_keys or not self.raw_values
        self.context_norm = nn.LayerNorm(dims.width, eps=dims.layer_norm_eps) if is_used else nn.Identity()
        self.attention = Attention(dims, "random" if not dims.local else "closed" if conditions else "local")
        self.mlp = FeedForward(dims) if with_mlp else nn.Identity()

    def forward(
        self,
        queries_BQD: Tensor,
        context_BND: Tensor,
        positions_ND: Tensor | None = None,
        codes: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Returns the updated queries [B, Q, D].

        The positions are added to the keys before their projection. The codes (see `Attention.forward`) are added to
        queries and keys after it.
        """
        normed_BND = self.context_norm(context_BND)
        keys_BND = self._keys(normed_BND, positions_ND)
        values_BND = context_BND if self.raw_values else normed_BND
        attended_BQD = queries_BQD + self.attention(self.query_norm(queries_BQD), keys_BND, values_BND, codes)
        out_BQD: Tensor = self.mlp(attended_BQD)
        return out_BQD

    def attention_map(
        self,
        queries_BQD: Tensor,
        context_BND: Tensor,
        positions_ND: Tensor | None = None,
        codes: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Returns the attention after softmax, averaged over the heads, [B, Q, N] in float32."""
        return self.attention.attention_map(
            self.query_norm(queries_BQD), self._keys(self.context_norm(context_BND), positions_ND), codes
        )

    def _keys(self, normed_BND: Tensor, positions_ND: Tensor | None) -> Tensor:
        if positions_ND is None:
            return normed_BND
        return normed_BND + positions_ND if self.content_keys else positions_ND.expand_as(normed_BND)
