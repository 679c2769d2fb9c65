"""Connectors between the vision tower and the language model: one connector class per configuration class."""

from collections.abc import Callable
from typing import Any

from parcelray.config.base import StrictModel
from parcelray.config.connector import (
    AnchorsOnlyConnectorConfig,
    ConnectorConfig,
    DualCrossAttentionConnectorConfig,
    FixedAnchorsConnectorConfig,
    IdentityConnectorConfig,
    M3ConnectorConfig,
    M3SelfAttentionConnectorConfig,
    MqtConnectorConfig,
    MqtSelfAttentionConnectorConfig,
    ParcelConnectorConfig,
    VitCrossAttentionConnectorConfig,
)
from parcelray.models.connectors.ablations import (
    AnchorsOnlyConnector,
    DualCrossAttentionConnector,
    FixedAnchorsConnector,
    M3SelfAttentionConnector,
    MqtSelfAttentionConnector,
    VitCrossAttentionConnector,
)
from parcelray.models.connectors.base import Connector, VisionDims
from parcelray.models.connectors.parcel import ParcelConnector
from parcelray.models.connectors.pooling import IdentityConnector, M3Connector
from parcelray.models.connectors.query_resampler import MqtConnector

__all__ = ["Connector", "build_connector"]

_BUILDERS: dict[type[StrictModel], Callable[[Any, VisionDims], Connector]] = {
    IdentityConnectorConfig: IdentityConnector,
    ParcelConnectorConfig: ParcelConnector,
    MqtConnectorConfig: MqtConnector,
    M3ConnectorConfig: M3Connector,
    AnchorsOnlyConnectorConfig: AnchorsOnlyConnector,
    FixedAnchorsConnectorConfig: FixedAnchorsConnector,
    VitCrossAttentionConnectorConfig: VitCrossAttentionConnector,
    DualCrossAttentionConnectorConfig: DualCrossAttentionConnector,
    MqtSelfAttentionConnectorConfig: MqtSelfAttentionConnector,
    M3SelfAttentionConnectorConfig: M3SelfAttentionConnector,
}


def build_connector(
    config: ConnectorConfig,
    *,
    hidden_size: int,
    grid_size: int,
    mlp_width: int,
    layer_norm_eps: float = 1e-6,
    projector_layers: int = 1,
) -> Connector:
    """Builds the connector for a configuration.

    Args:
        config: a member of the `ConnectorConfig` union.
        hidden_size: width D_v of the vision tower.
        grid_size: side of the tower's square patch grid.
        mlp_width: the tower's `intermediate_size`, used when the configuration leaves `mlp_width` unset.
        layer_norm_eps: epsilon of the connector's LayerNorms.
        projector_layers: number of linear layers of the model's projector.

    Raises:
        UserError: the configuration does not fit the vision tower.
    """
    return _BUILDERS[type(config)](
        config, VisionDims(hidden_size, grid_size, mlp_width, layer_norm_eps, projector_layers)
    )
