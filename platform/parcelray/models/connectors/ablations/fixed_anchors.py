"""Ablation: PARCEL without budget-aware routing."""

from parcelray.config.connector import FixedAnchorsConnectorConfig, RouteConfig
from parcelray.errors import UserError
from parcelray.models.connectors.base import VisionDims
from parcelray.models.connectors.parcel import AnchoredQueryConnector
from parcelray.models.connectors.query_path import SelfAttentionConditioner


class FixedAnchorsConnector(AnchoredQueryConnector):
    """PARCEL with the same anchor grid at every budget, from the anchors alone up to `max_budget`."""

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
