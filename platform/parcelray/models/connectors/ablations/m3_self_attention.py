"""Ablation: M3 with PARCEL's capacity, but without queries."""

from math import isqrt

from torch import Tensor
from torch.nn import functional as F

from parcelray.config.connector import M3SelfAttentionConnectorConfig
from parcelray.models.connectors.base import Connector, VisionDims
from parcelray.models.connectors.blocks import LearnedTokens, OutputNorm, SelfAttentionBlock, block_dims
from parcelray.models.connectors.matryoshka_pooling import halving_budgets
from parcelray.models.connectors.pooling import pool_grid


class M3SelfAttentionConnector(Connector):
    """The pooled tokens of M3 pass two self-attention blocks, the second with an MLP.

    These have PARCEL's eight projections and its MLP. A learned position for each patch, pooled as the features are,
    stands where PARCEL has its bank. Parameters at D = 1152, M = 4304, 16 x 16 patches: 20,852,048, 0.34 % above
    PARCEL's 20,780,624.
    """

    name = "m3_self_attention"

    def __init__(self, config: M3SelfAttentionConnectorConfig, dims: VisionDims) -> None:
        super().__init__(dims, halving_budgets(dims.grid_size))
        block = block_dims(config, width=dims.hidden_size, mlp_width=dims.mlp_width, layer_norm_eps=dims.layer_norm_eps)
        self.positions = LearnedTokens(dims.grid_size**2, dims.hidden_size, std=0.02)
        self.first_block = SelfAttentionBlock(block, with_mlp=False)
        self.second_block = SelfAttentionBlock(block, with_mlp=True)
        self.output_norm = OutputNorm(dims.hidden_size, eps=dims.layer_norm_eps)

    def num_anchors(self, num_visual_tokens: int) -> int:
        """Every token starts from a pooled cell and keeps its place."""
        self.check_budget(num_visual_tokens)
        return num_visual_tokens

    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Returns the mixed tokens of the pooled grid, row-major."""
        self.check_inputs(patch_features_BND, num_visual_tokens)
        side = isqrt(num_visual_tokens)
        pooled_BKD = pool_grid(patch_features_BND, grid_size=self.grid_size, side=side)
        # The residual stream starts at unit scale, as PARCEL's bank does; else the blocks' weight would depend on the
        # tower's scale.
        stream_BKD = F.layer_norm(pooled_BKD, (self.hidden_size,), eps=self.output_norm.eps)
        stream_BKD = stream_BKD + pool_grid(self.positions.weight[None], grid_size=self.grid_size, side=side)
        tokens_BKD: Tensor = self.output_norm(self.second_block(self.first_block(stream_BKD)))
        return tokens_BKD.to(patch_features_BND.dtype)
