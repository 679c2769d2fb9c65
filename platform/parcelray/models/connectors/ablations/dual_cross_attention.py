"""Ablation: conditioning by cross-attention instead of joint self-attention."""

from torch import Tensor, nn

from parcelray.config.connector import DualCrossAttentionConnectorConfig
from parcelray.errors import UserError
from parcelray.models.connectors.base import VisionDims
from parcelray.models.connectors.blocks import BlockDims, CrossAttentionBlock
from parcelray.models.connectors.parcel import AnchoredQueryConnector


class CrossAttentionConditioner(nn.Module):
    """Queries cross-attend to the anchors; no MLP and no added positions, as in the self-attention block that it replaces."""

    def __init__(self, dims: BlockDims) -> None:
        super().__init__()
        self.block = CrossAttentionBlock(dims, with_mlp=False)

    def forward(self, anchors_BPD: Tensor, queries_BQD: Tensor) -> Tensor:
        """Returns the pool-aware queries [B, Q, D]."""
        conditioned_BQD: Tensor = self.block(queries_BQD, anchors_BPD)
        return conditioned_BQD


class DualCrossAttentionConnector(AnchoredQueryConnector):
    """Queries cross-attend to the anchors, then to the patches; queries never see one another.

    Parameters at D = 1152, M = 4304, 16 x 16 patches: 20,782,928 (PARCEL plus one LayerNorm).
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
