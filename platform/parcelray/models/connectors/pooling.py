"""Average pooling of the patch grid, and the two connectors without parameters: identity and M3.

Shape suffixes: B batch, N patches, K visual tokens (the budget), D vision width.
"""

from math import isqrt

from torch import Tensor

from parcelray.config.connector import IdentityConnectorConfig, M3ConnectorConfig
from parcelray.errors import UserError
from parcelray.models.connectors.base import Connector, VisionDims


def pool_grid(patch_features_BND: Tensor, *, grid_size: int, side: int) -> Tensor:
    """Averages a row-major patch grid to `side` x `side` cells.

    Args:
        patch_features_BND: features of N = grid_size ** 2 patches.
        grid_size: side of the patch grid.
        side: side of the pooled grid, a divisor of `grid_size`; 0 gives no tokens.

    Returns:
        Pooled features [B, side ** 2, D], row-major.
    """
    if side == grid_size:
        return patch_features_BND
    if side == 0:
        return patch_features_BND[:, :0]
    check_divides(side, grid_size)
    batch_size, _, width = patch_features_BND.shape
    kernel = grid_size // side
    cells = patch_features_BND.reshape(batch_size, side, kernel, side, kernel, width)
    return cells.mean(dim=(2, 4)).reshape(batch_size, side * side, width)


def check_divides(side: int, grid_size: int) -> None:
    """Raises `UserError` unless an anchor grid of `side` x `side` tiles the patch grid."""
    if side != 0 and (side > grid_size or grid_size % side):
        divisors = ", ".join(str(value) for value in range(1, grid_size + 1) if grid_size % value == 0)
        raise UserError(
            f"an anchor grid of {side} x {side} does not tile a patch grid of {grid_size} x {grid_size}; legal sides"
            f" are {divisors} (or 0 for no anchors). Change anchor_grid."
        )


def halving_budgets(grid_size: int, *, to_one: bool = False) -> tuple[int, ...]:
    """Returns the squares of grid_size, grid_size / 2, grid_size / 4, ... in ascending order.

    The halving stops before a side that is not an integer or is below 2.

    Args:
        grid_size: side of the patch grid.
        to_one: whether a last step pools the smallest of these grids to one token.
    """
    sides = [grid_size]
    while sides[-1] % 2 == 0 and sides[-1] >= 4:
        sides.append(sides[-1] // 2)
    if to_one and sides[-1] > 1:
        sides.append(1)
    return tuple(side**2 for side in reversed(sides))


class IdentityConnector(Connector):
    """No compression: passes every patch. The reference that retention is measured against.

    The only legal budget is the number of patches.
    """

    name = "identity"

    def __init__(self, config: IdentityConnectorConfig, dims: VisionDims) -> None:
        super().__init__(dims, (dims.grid_size**2,))

    def num_anchors(self, num_visual_tokens: int) -> int:
        """Returns the budget: every token belongs to one patch."""
        self.check_budget(num_visual_tokens)
        return num_visual_tokens

    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Returns the patch features unchanged."""
        self.check_inputs(patch_features_BND, num_visual_tokens)
        return patch_features_BND


class M3Connector(Connector):
    """M3: square average pooling to one of a chain of grids, in one of two variants.

    - `release` (arXiv 2405.17430 and its code): the tokens are pooled after the projector. Each grid has half the side
      of the one before; the last one is a single token. The 24 x 24 patches of LLaVA-1.5 give the budgets 1, 9, 36, 144
      and 576. The default with a projector of several layers.
    - `parcel_baseline` (arXiv 2605.30126, Appendix E): the patch features are pooled before the projector, without the
      scale of one token. A patch grid of 16 x 16 gives the budgets 4, 16, 64 and 256; 32 x 32 adds 1024. The default
      with a linear projector, which gives the same tokens in either order.

    Both variants train one random scale per batch here, as the PARCEL paper does. The released code averages the loss
    over all scales in every step.
    """

    name = "m3"

    def __init__(self, config: M3ConnectorConfig, dims: VisionDims) -> None:
        variant = config.variant or ("parcel_baseline" if dims.projector_layers == 1 else "release")
        super().__init__(dims, halving_budgets(dims.grid_size, to_one=variant == "release"))
        self.after_projector = variant == "release"

    def num_anchors(self, num_visual_tokens: int) -> int:
        """Returns the budget: every token is a pooled cell."""
        self.check_budget(num_visual_tokens)
        return num_visual_tokens

    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Returns the pooled grid [B, K, D], row-major."""
        self.check_inputs(patch_features_BND, num_visual_tokens)
        return pool_grid(patch_features_BND, grid_size=self.grid_size, side=isqrt(num_visual_tokens))
