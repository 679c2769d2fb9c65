"""M3: square average pooling of the patch grid (baseline of arXiv 2605.30126, Appendix E)."""

from math import isqrt

from torch import Tensor

from parcelray.config.connector import M3ConnectorConfig
from parcelray.models.connectors.base import Connector, VisionDims
from parcelray.models.connectors.pooling import pool_grid


class M3Connector(Connector):
    """Pools to one of a chain of grids, each half the side of the one before; no parameters.

    A patch grid of 16 x 16 gives the budgets 4, 16, 64 and 256; 32 x 32 adds 1024; 12 x 12 gives 9, 36 and 144.
    """

    name = "m3"

    def __init__(self, config: M3ConnectorConfig, dims: VisionDims) -> None:
        super().__init__(dims, halving_budgets(dims.grid_size))

    def num_anchors(self, num_visual_tokens: int) -> int:
        """Every token is a pooled cell."""
        self.check_budget(num_visual_tokens)
        return num_visual_tokens

    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Returns the pooled grid, row-major."""
        self.check_inputs(patch_features_BND, num_visual_tokens)
        return pool_grid(patch_features_BND, grid_size=self.grid_size, side=isqrt(num_visual_tokens))


def halving_budgets(grid_size: int) -> tuple[int, ...]:
    """Squares of grid_size, grid_size / 2, grid_size / 4, ... while the side is whole and at least 2; ascending."""
    sides = [grid_size]
    while sides[-1] % 2 == 0 and sides[-1] >= 4:
        sides.append(sides[-1] // 2)
    return tuple(side**2 for side in reversed(sides))
