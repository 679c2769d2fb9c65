"""The learned part of the query connectors: bank, conditioning, cross-attention to the patches, output norm."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parcelray.models.connectors.blocks import (
    BlockDims,
    CrossAttentionBlock,
    LearnedTokens,
    OutputNorm,
    PlaceCode,
    SelfAttentionBlock,
    sincos_positions,
)
from parcelray.models.connectors.places import square_side


class SelfAttentionConditioner(nn.Module):
    """One self-attention block over [anchors; queries], of which the queries are returned (PCQR).

    See Section 3 of arXiv 2605.30126. The block has no MLP, as in the cost model of Appendix C: 8 K D^2 + 4 K^2 D for
    K = P + Q tokens.
    """

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        self.block = SelfAttentionBlock(dims, with_mlp=False)

    def forward(self, anchors_BPD: Tensor, queries_BQD: Tensor) -> Tensor:
        """Returns the anchor-conditioned queries [B, Q, D]."""
        mixed_BKD: Tensor = self.block(torch.cat([anchors_BPD, queries_BQD], dim=1))
        return mixed_BKD[:, anchors_BPD.shape[1] :]


class QueryPath(nn.Module):
    """Computes the first `num_queries` query tokens of one shared, ordered bank.

    arXiv 2605.30126 says only that new parameters are random. The start, the places and all positions are our choices.

    Local start. Codes of places are added to the projected queries and keys, and the projections of the content start
    small: each query begins with its attention around its place. Value and output projections start as identity, and
    the values are the raw patch features; the bank starts near 0, and all other branches without output. A query token
    is therefore at first a local average of patch features, at their scale, which the language model can read.

    Random start. All projections and the bank are random. Keys have fixed two-dimensional sine-cosine positions;
    otherwise the learned queries would depend on the position information in the last layer of the vision tower. The
    path ends in a LayerNorm (see `Connector.match_scale`). The bank has standard deviation 1, the scale of the normed
    features: with the customary 0.02, the residual stream would be little more than the mean of the attended tokens,
    which is the same for every query. Even so, little of a query token depends on the image at first, and a short
    training leaves it so.

    With the start `sincos` of MQT, the bank is the sum of fixed sine-cosine positions and of learned tokens of standard
    deviation 0.02, as in the released code of arXiv 2405.19315; the rest is as at the random start.

    Args:
        dims: sizes of the blocks, and whether the start is local.
        grid_size: side of the patch grid.
        places: place of each query of the bank, see `parcelray.models.connectors.places`.
        conditioner: module that maps anchors [B, P, D] and queries [B, Q, D] to queries before the cross-attention;
            None leaves the queries unchanged.
        content_keys: see `CrossAttentionBlock`.
        sincos_bank: whether the bank starts as the sine-cosine positions of the smallest square grid with as many
            cells, in raster order.
    """

    def __init__(
        self,
        dims: BlockDims,
        *,
        grid_size: int,
        places: Sequence[int],
        conditioner: nn.Module | None = None,
        content_keys: bool = True,
        sincos_bank: bool = False,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.sincos_side = square_side(len(places)) if sincos_bank else None
        std = 0.02 if dims.local or sincos_bank else 1.0
        self.bank = LearnedTokens(len(places), dims.width, std=std, decays=not dims.local)
        self.conditioner = conditioner
        self.place_code = PlaceCode(places, grid_size, dims) if dims.local else None
        self.has_key_positions = not (dims.local and content_keys)
        self.cross_attention = CrossAttentionBlock(dims, with_mlp=True, content_keys=content_keys)
        self.output_norm = nn.Identity() if dims.local else OutputNorm(dims.width, eps=dims.layer_norm_eps)

    def forward(self, anchors_BPD: Tensor, patch_features_BND: Tensor, num_queries: int) -> Tensor:
        """Returns query tokens [B, num_queries, D] in the dtype of the patch features; `num_queries` is at least 1."""
        queries_BQD = self._conditioned(anchors_BPD, num_queries)
        tokens_BQD: Tensor = self.output_norm(
            self.cross_attention(
                queries_BQD, patch_features_BND, self._positions(patch_features_BND), self._codes(num_queries)
            )
        )
        return tokens_BQD.to(patch_features_BND.dtype)

    def attention_map(self, anchors_BPD: Tensor, patch_features_BND: Tensor, num_queries: int) -> Tensor:
        """Returns the attention of the queries to the patches, averaged over the heads, [B, num_queries, N]."""
        queries_BQD = self._conditioned(anchors_BPD, num_queries)
        return self.cross_attention.attention_map(
            queries_BQD, patch_features_BND, self._positions(patch_features_BND), self._codes(num_queries)
        )

    def _conditioned(self, anchors_BPD: Tensor, num_queries: int) -> Tensor:
        queries_QD = self.bank.weight[:num_queries]
        if self.sincos_side is not None:
            queries_QD = (
                queries_QD + sincos_positions(self.sincos_side, queries_QD.shape[1], like=queries_QD)[:num_queries]
            )
        queries_BQD = queries_QD.expand(anchors_BPD.shape[0], -1, -1)
        if self.conditioner is None:
            return queries_BQD
        conditioned_BQD: Tensor = self.conditioner(anchors_BPD, queries_BQD)
        return conditioned_BQD

    def _codes(self, num_queries: int) -> tuple[Tensor, Tensor] | None:
        return None if self.place_code is None else self.place_code(num_queries)

    def _positions(self, patch_features_BND: Tensor) -> Tensor | None:
        if not self.has_key_positions:
            return None
        return sincos_positions(self.grid_size, patch_features_BND.shape[-1], like=patch_features_BND)
