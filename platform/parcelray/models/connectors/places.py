"""Places of visual tokens: the patch at which each token stands, in an order whose every prefix covers the image.

The order is our choice; arXiv 2605.30126 gives queries no places. A place is the raster index row * G + column in a
G x G patch grid.
"""

from functools import cache


def cell_centres(grid_size: int, side: int) -> tuple[int, ...]:
    """Returns the places of a pooled grid of `side` x `side` cells in raster order.

    A cell stands at the patch nearest its centre. In cells with an even side, four patches are equally near; the one
    with even row and column is taken. A grid of 16 x 16 or 32 x 32 patches then has the anchors of every coarser grid
    among the places of the grid with cells of 2 x 2, so that no anchor takes the place of a query.

    Args:
        grid_size: side G of the patch grid.
        side: side of the pooled grid, a divisor of `grid_size`; 0 gives no places.
    """
    if side == 0:
        return ()
    size = grid_size // side
    lines = [cell * size + _centre(size) for cell in range(side)]
    return tuple(row * grid_size + column for row in lines for column in lines)


@cache
def query_places(grid_size: int, anchor_grids: tuple[int, ...], num_queries: int) -> tuple[int, ...]:
    """Returns the places of the queries of a bank, in the order of the bank.

    The finest anchor grid divides the patches into cells. The anchor takes one patch of its cell, and the queries take
    the others: one offset in all cells, then the next one. Offsets are ordered so that each is far from those before
    and from the anchor; cells are in Bayer order. Hence every prefix is a lattice that is refined evenly. Without
    anchors, all patches are in Bayer order.

    A bank with more queries takes the anchors' patches last: first those that no other anchor grid uses. A bank with
    more queries than patches starts again at the first place.

    Args:
        grid_size: side G of the patch grid.
        anchor_grids: sides of the anchor grids that the connector uses; 0: no anchors. A grid as fine as the patches
            leaves no patch to queries and is ignored.
        num_queries: size of the bank.
    """
    sides = sorted({side for side in anchor_grids if 0 < side < grid_size})
    order = _lattice_order(grid_size, sides[-1] if sides else grid_size)
    if sides:
        shared = {
            place: rank for rank, side in enumerate(reversed(sides[:-1]), 1) for place in cell_centres(grid_size, side)
        }
        anchors = set(cell_centres(grid_size, sides[-1]))
        order += sorted(
            (place for place in bayer_order(grid_size) if place in anchors), key=lambda place: shared.get(place, 0)
        )
    return tuple(order[index % len(order)] for index in range(num_queries))


def raster_places(grid_size: int, num_queries: int) -> tuple[int, ...]:
    """Returns the places of a bank in the raster order of the smallest square grid that has as many cells.

    Args:
        grid_size: side G of the patch grid, which the square grid is stretched over.
        num_queries: size of the bank.
    """
    side = square_side(num_queries)
    lines = [(2 * line + 1) * grid_size // (2 * side) for line in range(side)]
    return tuple(row * grid_size + column for row in lines for column in lines)[:num_queries]


def square_side(count: int) -> int:
    """Returns the side of the smallest square grid with at least `count` cells."""
    return next(side for side in range(1, count + 1) if side**2 >= count)


@cache
def bayer_order(side: int) -> tuple[int, ...]:
    """Returns the raster indices of a square grid in Bayer order: a two-dimensional bit-reversal sequence.

    Each prefix of 4 ** n indices is a regular lattice if the side is a power of 2. Otherwise the order is that of the
    next power of 2, without the indices outside the grid.
    """
    bits = (side - 1).bit_length()

    def rank(index: int) -> int:
        row, column = divmod(index, side)
        digits = (((row ^ column) >> bit & 1) * 2 + (row >> bit & 1) for bit in range(bits))
        return sum(digit << 2 * (bits - 1 - bit) for bit, digit in enumerate(digits))

    return tuple(sorted(range(side**2), key=rank))


def _lattice_order(grid_size: int, side: int) -> list[int]:
    """Returns the places that the anchors of `side` x `side` cells leave; with cells of one patch, all places."""
    size = grid_size // side
    offsets = _offset_order(size)[1:] if size > 1 else [(0, 0)]
    cells = [divmod(cell, side) for cell in bayer_order(side)]
    return [(row * size + down) * grid_size + column * size + right for down, right in offsets for row, column in cells]


def _offset_order(size: int) -> list[tuple[int, int]]:
    """Returns the offsets in a cell, from the anchor's on: each has the least energy with those before.

    The energy is the sum of 1 / distance ** 4, with the cell continued periodically; equals are in raster order. For a
    size of 2 this is (0, 0), (1, 1), (0, 1), (1, 0).
    """
    order = [(_centre(size), _centre(size))]
    energies = dict.fromkeys(((down, right) for down in range(size) for right in range(size)), 0.0)
    while True:
        energies.pop(order[-1])
        if not energies:
            return order
        for offset in energies:
            gaps = [abs(one - other) for one, other in zip(offset, order[-1], strict=True)]
            energies[offset] += sum(min(gap, size - gap) ** 2 for gap in gaps) ** -2.0
        # Rounded: sums of the same terms in another order are equal.
        order.append(min(energies, key=lambda offset: round(energies[offset], 9)))


def _centre(size: int) -> int:
    """Returns the row, or column, nearest the middle of a cell; the even one of two."""
    return size // 2 if size % 2 or size % 4 == 0 else size // 2 - 1
