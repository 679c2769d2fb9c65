"""Square average pooling of a patch grid."""

from torch import Tensor

from parcelray.errors import UserError


def pool_grid(patch_features_BND: Tensor, *, grid_size: int, side: int) -> Tensor:
    """Averages a row-major patch grid to `side` x `side` cells; no parameters.

    Args:
        patch_features_BND: N = grid_size ** 2 patches.
        grid_size: side of the patch grid.
        side: side of the pooled grid, a divisor of `grid_size`; 0 gives no tokens.

    Returns:
        [B, side ** 2, D], row-major.
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
    """Refuses an anchor grid that does not tile the patch grid."""
    if side != 0 and (side > grid_size or grid_size % side):
        divisors = ", ".join(str(value) for value in range(1, grid_size + 1) if grid_size % value == 0)
        raise UserError(
            f"an anchor grid of {side} x {side} does not tile a patch grid of {grid_size} x {grid_size}; legal sides"
            f" are {divisors} (or 0 for no anchors). Change anchor_grid."
        )
