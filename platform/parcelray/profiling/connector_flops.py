"""FLOPs of each connector for one image, by the paper's cost model (arXiv 2605.30126, Appendix C).

The paper gives the formulas for PARCEL. The other connectors use the same formulas for the same blocks. Pooling, norms
and positions are not counted.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from parcelray.config.connector import (
    AttentionConnectorConfig,
    ConnectorConfig,
    DualCrossAttentionConnectorConfig,
    FixedAnchorsConnectorConfig,
    M3SelfAttentionConnectorConfig,
    MqtSelfAttentionConnectorConfig,
    ParcelConnectorConfig,
)
from parcelray.profiling.backbone_shapes import BackboneShape

if TYPE_CHECKING:
    from parcelray.models.connectors import Connector


class ConnectorFlops(NamedTuple):
    """FLOPs of a connector for one image, by block."""

    self_attention: int = 0
    cross_attention: int = 0
    mlp: int = 0


def connector_flops(shape: BackboneShape, connector: ConnectorConfig | None, num_visual_tokens: int) -> ConnectorFlops:
    """Computes the FLOPs between vision tower and projection for one image.

    Args:
        shape: dimensions of the backbone.
        connector: configuration of the connector; None: no connector cost, at any budget.
        num_visual_tokens: budget B, visual tokens per image.

    Raises:
        UnsupportedBudgetError: the connector does not support the budget.
    """
    if connector is None:
        return ConnectorFlops()
    built = _built_on_meta(connector, shape)
    num_anchors = built.num_anchors(num_visual_tokens)
    num_queries = num_visual_tokens - num_anchors
    width = shape.vision_width
    if isinstance(connector, M3SelfAttentionConnectorConfig):
        mlp = mlp_flops(num_visual_tokens, width, connector.mlp_width or shape.vision_mlp_width)
        return ConnectorFlops(2 * self_attention_flops(num_visual_tokens, width), 0, mlp)
    if not isinstance(connector, AttentionConnectorConfig) or num_queries == 0:
        return ConnectorFlops()
    self_attention = 0
    cross_attention = cross_attention_flops(num_queries, shape.num_patches, width)
    if isinstance(connector, ParcelConnectorConfig | FixedAnchorsConnectorConfig | MqtSelfAttentionConnectorConfig):
        self_attention = self_attention_flops(num_visual_tokens, width)
    elif isinstance(connector, DualCrossAttentionConnectorConfig):
        cross_attention += cross_attention_flops(num_queries, num_anchors, width)
    return ConnectorFlops(
        self_attention, cross_attention, mlp_flops(num_queries, width, connector.mlp_width or shape.vision_mlp_width)
    )


def self_attention_flops(num_tokens: int, width: int) -> int:
    """Computes 8 n D^2 + 4 n^2 D: four projections, and the products with keys and values."""
    return 8 * num_tokens * width**2 + 4 * num_tokens**2 * width


def cross_attention_flops(num_queries: int, num_context: int, width: int) -> int:
    """Computes 4 (q + n) D^2 + 4 q n D: two projections each of queries and context, and the two products."""
    return 4 * (num_queries + num_context) * width**2 + 4 * num_queries * num_context * width


def mlp_flops(num_tokens: int, width: int, mlp_width: int) -> int:
    """Computes 4 n D M: the two layers of an MLP."""
    return 4 * num_tokens * width * mlp_width


def projected_tokens(shape: BackboneShape, connector: ConnectorConfig | None, num_visual_tokens: int) -> int:
    """Returns the number of tokens of an image that pass the projector: all patches, if the connector acts after it."""
    after = connector is not None and _built_on_meta(connector, shape).after_projector
    return shape.num_patches if after else num_visual_tokens


def supported_budgets(connector: ConnectorConfig, shape: BackboneShape) -> tuple[int, ...]:
    """Returns the budgets that a connector supports for a backbone, in ascending order."""
    return _built_on_meta(connector, shape).supported_budgets


def connector_for(config: ConnectorConfig, shape: BackboneShape) -> "Connector":
    """Builds the connector of a backbone on torch's default device."""
    # Imported here because code that only reads shapes must work without torch.
    from parcelray.models.connectors import build_connector

    return build_connector(
        config,
        hidden_size=shape.vision_width,
        grid_size=shape.grid_size,
        mlp_width=shape.vision_mlp_width,
        projector_layers=shape.projector_layers,
    )


@lru_cache(maxsize=64)
def _built_on_meta(config: ConnectorConfig, shape: BackboneShape) -> "Connector":
    # The connector itself defines its legal budgets and their split into anchors and queries. On `meta`, building it
    # takes no memory. The number of heads changes neither budgets nor cost, and the default does not divide every width.
    import torch

    if isinstance(config, AttentionConnectorConfig):
        config = config.model_copy(update={"num_heads": 1})
    with torch.device("meta"):
        return connector_for(config, shape)
