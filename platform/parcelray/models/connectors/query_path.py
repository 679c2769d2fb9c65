"""The learned part of the query connectors: bank, conditioning, cross-attention to the patches, output norm."""

import torch
from torch import Tensor, nn

from parcelray.models.connectors.blocks import (
    BlockDims,
    CrossAttentionBlock,
    LearnedTokens,
    OutputNorm,
    SelfAttentionBlock,
    sincos_positions,
)


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

    Two choices that the paper leaves open. Keys have fixed two-dimensional sine-cosine positions, without parameters
    and, in the cost model, without FLOPs. Otherwise the learned queries would depend on the position information in the
    last layer of the vision tower. The path ends in a LayerNorm (see `Connector.match_scale`).

    The bank is initialised with standard deviation 1, the scale of the normed features. With the customary 0.02, the
    residual stream would be little more than the mean of the attended tokens. That mean is the same for every query, so
    the queries would start collapsed.

    Args:
        dims: sizes of the blocks.
        grid_size: side of the patch grid.
        num_queries: size of the bank.
        conditioner: module that maps anchors [B, P, D] and queries [B, Q, D] to queries before the cross-attention;
            None leaves the queries unchanged.
        content_keys: see `CrossAttentionBlock`.
    """

    def __init__(
        self,
        dims: BlockDims,
        *,
        grid_size: int,
        num_queries: int,
        conditioner: nn.Module | None = None,
        content_keys: bool = True,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.bank = LearnedTokens(num_queries, dims.width, std=1.0)
        self.conditioner = conditioner
        self.cross_attention = CrossAttentionBlock(dims, with_mlp=True, content_keys=content_keys)
        self.output_norm = OutputNorm(dims.width, eps=dims.layer_norm_eps)

    def forward(self, anchors_BPD: Tensor, patch_features_BND: Tensor, num_queries: int) -> Tensor:
        """Returns query tokens [B, num_queries, D] in the dtype of the patch features; `num_queries` is at least 1."""
        queries_BQD = self._conditioned(anchors_BPD, num_queries)
        tokens_BQD: Tensor = self.output_norm(
            self.cross_attention(queries_BQD, patch_features_BND, self._positions(patch_features_BND))
        )
        return tokens_BQD.to(patch_features_BND.dtype)

    def attention_map(self, anchors_BPD: Tensor, patch_features_BND: Tensor, num_queries: int) -> Tensor:
        """Returns the attention of the queries to the patches, averaged over the heads, [B, num_queries, N]."""
        queries_BQD = self._conditioned(anchors_BPD, num_queries)
        return self.cross_attention.attention_map(queries_BQD, patch_features_BND, self._positions(patch_features_BND))

    def _conditioned(self, anchors_BPD: Tensor, num_queries: int) -> Tensor:
        queries_BQD = self.bank.weight[:num_queries].expand(anchors_BPD.shape[0], -1, -1)
        if self.conditioner is None:
            return queries_BQD
        conditioned_BQD: Tensor = self.conditioner(anchors_BPD, queries_BQD)
        return conditioned_BQD

    def _positions(self, patch_features_BND: Tensor) -> Tensor:
        return sincos_positions(self.grid_size, patch_features_BND.shape[-1], like=patch_features_BND)
