"""Ablations of PARCEL and capacity-matched baselines (arXiv 2605.30126): each changes one part of the PARCEL connector.

Parameter counts are for D = 1152, M = 4304 and 16 x 16 patches (PARCEL: 20,780,624).
Shape suffixes: B batch, N patches, P anchors, Q queries, K visual tokens (the budget), D vision width.
"""

from math import isqrt

from torch import Tensor, nn
from torch.nn import functional as F

from parcelray.config.connector import (
    AnchorsOnlyConnectorConfig,
    DualCrossAttentionConnectorConfig,
    FixedAnchorsConnectorConfig,
    M3SelfAttentionConnectorConfig,
    MqtSelfAttentionConnectorConfig,
    RouteConfig,
    VitCrossAttentionConnectorConfig,
)
from parcelray.errors import UserError
from parcelray.models.connectors.base import Connector, VisionDims
from parcelray.models.connectors.blocks import (
    BlockDims,
    CrossAttentionBlock,
    LearnedTokens,
    OutputNorm,
    SelfAttentionBlock,
    block_dims,
)
from parcelray.models.connectors.parcel import AnchoredQueryConnector
from parcelray.models.connectors.pooling import check_divides, halving_budgets, pool_grid
from parcelray.models.connectors.query_path import SelfAttentionConditioner


class AnchorsOnlyConnector(Connector):
    """Average pooling only: one anchor grid, no queries, no parameters.

    The only legal budget is the number of anchors, `anchor_grid ** 2`.
    """

    name = "anchors_only"

    def __init__(self, config: AnchorsOnlyConnectorConfig, dims: VisionDims) -> None:
        check_divides(config.anchor_grid, dims.grid_size)
        super().__init__(dims, (config.anchor_grid**2,))
        self.anchor_grid = config.anchor_grid

    def num_anchors(self, num_visual_tokens: int) -> int:
        """Returns the budget: every token is an anchor."""
        self.check_budget(num_visual_tokens)
        return num_visual_tokens

    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Returns the pooled grid [B, K, D], row-major."""
        self.check_inputs(patch_features_BND, num_visual_tokens)
        return pool_grid(patch_features_BND, grid_size=self.grid_size, side=self.anchor_grid)


class FixedAnchorsConnector(AnchoredQueryConnector):
    """PARCEL without budget-aware routing: the same anchor grid at every budget.

    Legal budgets are `anchor_grid ** 2` (anchors only) to `max_budget`.
    """

    name = "fixed_anchors"

    def __init__(self, config: FixedAnchorsConnectorConfig, dims: VisionDims) -> None:
        num_anchors = config.anchor_grid**2
        max_budget = config.max_budget if config.max_budget is not None else dims.grid_size**2
        if max_budget < num_anchors:
            raise UserError(
                f"fixed_anchors: max_budget {max_budget} is below the {num_anchors} anchors; raise max_budget or use a"
                " smaller anchor_grid."
            )
        routing = (RouteConfig(min_budget=num_anchors, max_budget=max_budget, anchor_grid=config.anchor_grid),)
        super().__init__(config, dims, routing=routing, make_conditioner=SelfAttentionConditioner)


class VitCrossAttentionConnector(AnchoredQueryConnector):
    """PARCEL without the self-attention block: queries attend to the patches, without conditioning on the anchors.

    Not capacity-matched: 15,465,296 parameters.
    """

    name = "vit_cross_attention"

    def __init__(self, config: VitCrossAttentionConnectorConfig, dims: VisionDims) -> None:
        super().__init__(config, dims, routing=config.routing, make_conditioner=None)


class CrossAttentionConditioner(nn.Module):
    """Conditions the queries on the anchors by cross-attention.

    Like the self-attention block that it replaces, it has no MLP and adds no positions.
    """

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        self.block = CrossAttentionBlock(dims, with_mlp=False, conditions=True)

    def forward(self, anchors_BPD: Tensor, queries_BQD: Tensor) -> Tensor:
        """Returns the anchor-conditioned queries [B, Q, D]."""
        conditioned_BQD: Tensor = self.block(queries_BQD, anchors_BPD)
        return conditioned_BQD


class DualCrossAttentionConnector(AnchoredQueryConnector):
    """PARCEL with cross-attention instead of joint self-attention: queries attend to the anchors, then to the patches.

    Queries never attend to one another. 20,782,928 parameters (PARCEL plus one LayerNorm).
    """

    name = "dual_cross_attention"

    def __init__(self, config: DualCrossAttentionConnectorConfig, dims: VisionDims) -> None:
        super().__init__(config, dims, routing=config.routing, make_conditioner=CrossAttentionConditioner)
        for route in self.routing:
            if route.anchor_grid == 0:
                raise UserError(
                    f"dual_cross_attention: the interval {route.min_budget} to {route.max_budget} has anchor_grid 0, so"
                    " its queries have no anchor to attend to. Set anchor_grid to at least 1."
                )


class MqtSelfAttentionConnector(AnchoredQueryConnector):
    """MQT with PARCEL's capacity and no anchors: the first K queries attend to one another, then to the patches.

    Without anchors, the self-attention has no input from the image. 20,854,352 parameters with 256 queries, 0.35 %
    above PARCEL's, because its bank has 256 queries instead of 192.
    """

    name = "mqt_self_attention"

    def __init__(self, config: MqtSelfAttentionConnectorConfig, dims: VisionDims) -> None:
        routing = (RouteConfig(min_budget=1, max_budget=config.num_queries, anchor_grid=0),)
        super().__init__(config, dims, routing=routing, make_conditioner=SelfAttentionConditioner)


class M3SelfAttentionConnector(Connector):
    """M3 with PARCEL's capacity and no queries: the pooled tokens pass two self-attention blocks.

    The two blocks have PARCEL's eight projections, and the second has its MLP. A learned position per patch replaces
    PARCEL's query bank; the positions are pooled in the same way as the features. 20,852,048 parameters, 0.34 % above
    PARCEL's.
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
        """Returns the budget: every token starts from a pooled cell and keeps its position."""
        self.check_budget(num_visual_tokens)
        return num_visual_tokens

    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Returns the tokens of the pooled grid after self-attention, [B, K, D], row-major."""
        self.check_inputs(patch_features_BND, num_visual_tokens)
        side = isqrt(num_visual_tokens)
        pooled_BKD = pool_grid(patch_features_BND, grid_size=self.grid_size, side=side)
        # The residual stream starts at unit scale, as PARCEL's bank does. Otherwise the weight of the blocks in the sum
        # would depend on the scale of the vision tower.
        stream_BKD = F.layer_norm(pooled_BKD, (self.hidden_size,), eps=self.output_norm.eps)
        stream_BKD = stream_BKD + pool_grid(self.positions.weight[None], grid_size=self.grid_size, side=side)
        tokens_BKD: Tensor = self.output_norm(self.second_block(self.first_block(stream_BKD)))
        return tokens_BKD.to(patch_features_BND.dtype)
