"""The learned half of the query connectors: bank -> conditioning -> cross-attention to the patches -> output norm."""

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
    """One self-attention block over [anchors; queries], of which the query part is kept (PCQR, arXiv 2605.30126, Section 3).

    No MLP, as in the cost model of Appendix C: 8 K D^2 + 4 K^2 D for K = P + Q tokens.
    """

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        self.block = SelfAttentionBlock(dims, with_mlp=False)

    def forward(self, anchors_BPD: Tensor, queries_BQD: Tensor) -> Tensor:
        """Returns the pool-aware queries [B, Q, D]."""
        mixed_BKD: Tensor = self.block(torch.cat([anchors_BPD, queries_BQD], dim=1))
        return mixed_BKD[:, anchors_BPD.shape[1] :]


class QueryPath(nn.Module):
    """Produces the first `num_queries` query tokens of one shared, ordered bank.

    Departures from the paper's text, which leaves them open: keys carry fixed two-dimensional sine-cosine positions
    (free of parameters and, in the cost model, of FLOPs), since learned queries otherwise depend on what position the
    vision tower leaves in its last layer; and the path ends in a LayerNorm (see `Connector.match_scale`).

    The bank starts with standard deviation 1, the scale of the normed features: with the customary 0.02 the residual
    stream would be little more than the mean of the attended tokens, the same for every query, and the queries would
    start collapsed.

    Args:
        dims: sizes.
        grid_size: side of the patch grid.
        num_queries: size of the bank.
        conditioner: called with (anchors [B, P, D], queries [B, Q, D]) before the cross-attention, returns queries;
            None leaves them as they are.
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
        """Returns query tokens [B, num_queries, D] in the dtype of the patch features; `num_queries` >= 1."""
        queries_BQD = self._conditioned(anchors_BPD, num_queries)
        tokens_BQD: Tensor = self.output_norm(
            self.cross_attention(queries_BQD, patch_features_BND, self._positions(patch_features_BND))
        )
        return tokens_BQD.to(patch_features_BND.dtype)

    def attention_map(self, anchors_BPD: Tensor, patch_features_BND: Tensor, num_queries: int) -> Tensor:
        """Head-averaged attention of the queries over the patches, [B, num_queries, N]."""
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
