"""Ablation: average pooling only."""

from torch import Tensor

from parcelray.config.connector import AnchorsOnlyConnectorConfig
from parcelray.models.connectors.base import Connector, VisionDims
from parcelray.models.connectors.pooling import check_divides, pool_grid


class AnchorsOnlyConnector(Connector):
    """One anchor grid and no queries; its square is the only budget. No parameters."""

    name = "anchors_only"

    def __init__(self, config: AnchorsOnlyConnectorConfig, dims: VisionDims) -> None:
        check_divides(config.anchor_grid, dims.grid_size)
        super().__init__(dims, (config.anchor_grid**2,))
        self.anchor_grid = config.anchor_grid

    def num_anchors(self, num_visual_tokens: int) -> int:
        """Every token is an anchor."""
        self.check_budget(num_visual_tokens)
        return num_visual_tokens

    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Returns the pooled grid, row-major."""
        self.check_inputs(patch_features_BND, num_visual_tokens)
        return pool_grid(patch_features_BND, grid_size=self.grid_size, side=self.anchor_grid)
