"""Budget-aware routing: the anchor grid and the number of queries of each budget (arXiv 2605.30126, Section 3)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from parcelray.config.connector import RouteConfig
from parcelray.errors import UserError
from parcelray.models.connectors.pooling import check_divides

_DEFAULT_ROUTING: dict[int, tuple[tuple[int, int, int], ...]] = {
    16: ((16, 63, 4), (64, 256, 8)),
    24: ((16, 63, 4), (64, 576, 8)),
    32: ((16, 63, 4), (64, 255, 8), (256, 1024, 16)),
}
"""(min_budget, max_budget, anchor_grid) by side of the patch grid.

16 and 32 are the paper's, images of 224 px and 448 px with 14 px patches. 24 is ours, for LLaVA-1.5: the anchors of the
paper's rule for 16.
"""


class Split(NamedTuple):
    """The division of a budget into anchors and queries."""

    anchor_grid: int
    num_anchors: int
    num_queries: int


def default_routing(grid_size: int) -> tuple[RouteConfig, ...]:
    """Returns the routing for a patch grid of 16 x 16 (224 px), 32 x 32 (448 px) or 24 x 24 (336 px).

    Raises:
        UserError: the grid has another size, so its routing must be given.
    """
    if grid_size not in _DEFAULT_ROUTING:
        known = ", ".join(f"{side} x {side}" for side in _DEFAULT_ROUTING)
        raise UserError(
            f"there is no default routing for a patch grid of {grid_size} x {grid_size}; there is one for grids of"
            f" {known}. Set the `routing` intervals in the connector's configuration."
        )
    return tuple(
        RouteConfig(min_budget=low, max_budget=high, anchor_grid=side)
        for low, high, side in _DEFAULT_ROUTING[grid_size]
    )


def resolve_routing(routing: Sequence[RouteConfig] | None, grid_size: int) -> tuple[RouteConfig, ...]:
    """Returns the checked routing for a patch grid: the given one, or the paper's if none is given.

    Gaps between intervals are legal (their budgets are unsupported). Overlaps, descending order, and anchor grids that
    do not tile the patch grid are errors.
    """
    if routing is None:
        return default_routing(grid_size)
    if not routing:
        raise UserError(
            "the routing is empty, so no budget is legal; give at least one interval, or leave `routing` unset for the"
            " paper's."
        )
    for route in routing:
        check_divides(route.anchor_grid, grid_size)
    for before, after in pairwise(routing):
        if after.min_budget <= before.max_budget:
            raise UserError(
                f"routing interval {after.min_budget} to {after.max_budget} follows {before.min_budget} to"
                f" {before.max_budget}; intervals must ascend without overlap. Reorder them, or move their limits."
            )
    return tuple(routing)


def routed_budgets(routing: Sequence[RouteConfig]) -> tuple[int, ...]:
    """Returns every integer budget inside the intervals in ascending order."""
    return tuple(budget for route in routing for budget in range(route.min_budget, route.max_budget + 1))


def bank_size(routing: Sequence[RouteConfig]) -> int:
    """Returns the size of the shared query bank: the largest number of queries that a routed budget uses."""
    return max(route.max_budget - route.anchor_grid**2 for route in routing)


def split_budget(routing: Sequence[RouteConfig], num_visual_tokens: int) -> Split:
    """Returns the anchors and queries of a budget, which must be inside an interval."""
    route = next(route for route in routing if route.min_budget <= num_visual_tokens <= route.max_budget)
    num_anchors = route.anchor_grid**2
    return Split(route.anchor_grid, num_anchors, num_visual_tokens - num_anchors)
