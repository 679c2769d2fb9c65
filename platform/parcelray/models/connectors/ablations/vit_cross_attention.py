"""Ablation: queries that do not see the anchors."""

from parcelray.config.connector import VitCrossAttentionConnectorConfig
from parcelray.models.connectors.base import VisionDims
from parcelray.models.connectors.parcel import AnchoredQueryConnector


class VitCrossAttentionConnector(AnchoredQueryConnector):
    """PARCEL without the self-attention block: queries cross-attend to the patch features only.

    Not capacity matched: 15,465,296 parameters at D = 1152, M = 4304, 16 x 16 patches (PARCEL: 20,780,624).
    """

    name = "vit_cross_attention"

    def __init__(self, config: VitCrossAttentionConnectorConfig, dims: VisionDims) -> None:
        super().__init__(config, dims, routing=config.routing, make_conditioner=None)
