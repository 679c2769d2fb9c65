"""Ablation: MQT with PARCEL's capacity, but without anchors."""

from parcelray.config.connector import MqtSelfAttentionConnectorConfig, RouteConfig
from parcelray.models.connectors.base import VisionDims
from parcelray.models.connectors.parcel import AnchoredQueryConnector
from parcelray.models.connectors.query_path import SelfAttentionConditioner


class MqtSelfAttentionConnector(AnchoredQueryConnector):
    """The first K queries attend to one another, then to the patches; no anchors, so the self-attention sees no image.

    Parameters at D = 1152, M = 4304 and 256 queries: 20,854,352, 0.35 % above PARCEL's 20,780,624 (a bank of 256
    instead of 192).
    """

    name = "mqt_self_attention"

    def __init__(self, config: MqtSelfAttentionConnectorConfig, dims: VisionDims) -> None:
        routing = (RouteConfig(min_budget=1, max_budget=config.num_queries, anchor_grid=0),)
        super().__init__(config, dims, routing=routing, make_conditioner=SelfAttentionConditioner)
