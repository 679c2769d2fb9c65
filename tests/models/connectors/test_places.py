"""Places of tokens: distinct, evenly spread in every prefix, and the centres of cells for anchors."""

from math import sqrt

import numpy as np
import pytest

from parcelray.config.connector import (
    AnchorsOnlyConnectorConfig,
    ConnectorConfig,
    FixedAnchorsConnectorConfig,
    IdentityConnectorConfig,
    M3ConnectorConfig,
    M3SelfAttentionConnectorConfig,
    MqtConnectorConfig,
    MqtSelfAttentionConnectorConfig,
    ParcelConnectorConfig,
)
from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.connectors import Connector, build_connector
from parcelray.models.connectors.places import bayer_order, cell_centres, query_places


def _build(config: ConnectorConfig, grid_size: int) -> Connector:
    if "num_heads" in type(config).model_fields:
        config = config.model_copy(update={"num_heads": 2})
    return build_connector(config, hidden_size=8, grid_size=grid_size, mlp_width=8)


@pytest.mark.parametrize(
    ("grid_size", "side", "first"),
    [
        (16, 16, (0, 0)),
        (16, 8, (0, 0)),
        (16, 4, (2, 2)),
        (16, 2, (4, 4)),
        (16, 1, (8, 8)),
        (24, 8, (1, 1)),
        (24, 4, (2, 2)),
        (24, 3, (4, 4)),
        (9, 3, (1, 1)),
        (9, 1, (4, 4)),
    ],
)
def test_a_cell_stands_at_the_patch_nearest_its_centre(grid_size: int, side: int, first: tuple[int, int]) -> None:
    places = np.array([divmod(place, grid_size) for place in cell_centres(grid_size, side)])
    size = grid_size // side
    assert tuple(places[0]) == first
    steps = np.stack(np.divmod(np.arange(side**2), side), axis=1)
    assert (places == places[0] + size * steps).all(), "cells are in raster order, a cell apart"
    assert np.abs(places[0] - (size - 1) / 2).max() <= 0.5


@pytest.mark.parametrize(
    ("config", "grid_size"),
    [
        (ParcelConnectorConfig(), 16),
        (ParcelConnectorConfig(), 24),
        (ParcelConnectorConfig(), 32),
        (ParcelConnectorConfig(anchor_grids=(0, 4, 8)), 16),
        (FixedAnchorsConnectorConfig(anchor_grid=4), 16),
        (MqtConnectorConfig(), 16),
        (MqtConnectorConfig(start="sincos"), 16),
        (MqtConnectorConfig(num_queries=100, start="sincos"), 24),
        (MqtConnectorConfig(), 24),
        (MqtSelfAttentionConnectorConfig(num_queries=576), 24),
        (M3ConnectorConfig(variant="release"), 24),
        (M3SelfAttentionConnectorConfig(), 16),
        (AnchorsOnlyConnectorConfig(), 16),
        (IdentityConnectorConfig(), 16),
    ],
    ids=lambda value: getattr(value, "type", value),
)
def test_every_token_has_a_place_of_its_own_and_all_tokens_cover_all_patches(
    config: ConnectorConfig, grid_size: int
) -> None:
    connector = _build(config, grid_size)
    for budget in connector.supported_budgets:
        places = connector.token_places(budget)
        assert len(set(places)) == budget
        if budget == grid_size**2:
            assert sorted(places) == list(range(grid_size**2))
    for side in getattr(connector, "anchor_grids", ()):
        assert len(set(connector.token_places(200, side))) == 200
        assert connector.token_places(200, side)[: side**2] == cell_centres(grid_size, side)
    with pytest.raises(UnsupportedBudgetError):
        connector.token_places(grid_size**2 + 1)
    if config.type != "parcel":
        with pytest.raises(UserError, match=r"does not support a choice of the anchor grid|is not one of this"):
            connector.token_places(connector.supported_budgets[0], 2)


def test_the_order_of_the_queries_of_16_x_16_patches() -> None:
    """All (1, 1) patches of the cells of 2 x 2, then all (0, 1), then all (1, 0), each in Bayer order of the cells."""
    places = [divmod(place, 16) for place in query_places(16, (4, 8), 192)]
    assert [(row % 2, column % 2) for row, column in places] == [(1, 1)] * 64 + [(0, 1)] * 64 + [(1, 0)] * 64
    cells = [(row // 2, column // 2) for row, column in places]
    assert cells[:64] == cells[64:128] == cells[128:]
    assert cells[:8] == [(0, 0), (4, 4), (0, 4), (4, 0), (2, 2), (6, 6), (2, 6), (6, 2)]
    assert bayer_order(2) == (0, 3, 1, 2)


@pytest.mark.parametrize(
    ("grid_size", "sides", "imbalance"),
    [(16, (4, 8), 0), (16, (), 0), (24, (4, 8), 0), (24, (), 3), (32, (4, 8, 16), 0)],
)
def test_every_prefix_of_the_queries_covers_the_image_evenly(
    grid_size: int, sides: tuple[int, ...], imbalance: int
) -> None:
    """The largest distance of a patch to its nearest query is at most 2.2 times that of as many queries in a lattice.

    A lattice that is being refined has gaps of up to twice that. On 24 x 24 patches without anchors, the lattice of the
    next power of 2 is cut off.
    """
    places = query_places(grid_size, sides, grid_size**2 - max(sides, default=0) ** 2)
    points = np.array([divmod(place, grid_size) for place in places])
    patches = np.stack(np.divmod(np.arange(grid_size**2), grid_size), axis=1)
    nearest = np.full(grid_size**2, np.inf)
    for count, point in enumerate(points, 1):
        nearest = np.minimum(nearest, np.hypot(*(patches - point).T))
        assert nearest.max() <= 2.2 * grid_size / sqrt(2 * count), f"{count} queries"
    quadrants = (points >= grid_size // 2) @ [2, 1]
    for count in (4, 16, 64):
        counts = np.bincount(quadrants[:count], minlength=4)
        assert counts.max() - counts.min() <= imbalance, f"{count} queries: {counts}"


@pytest.mark.parametrize("num_queries", [1, 10, 64, 100])
def test_a_bank_may_be_smaller_or_larger_than_the_grid(num_queries: int) -> None:
    """A bank larger than the grid starts again at the first place."""
    places = query_places(8, (), num_queries)
    assert len(places) == num_queries
    assert len(set(places)) == min(64, num_queries)
    assert places[64:] == places[: max(0, num_queries - 64)]
