"""Budget-aware routing, and the budgets of M3."""

import pytest

from parcelray.config.connector import M3ConnectorConfig, RouteConfig
from parcelray.errors import UserError
from parcelray.models.connectors import build_connector
from parcelray.models.connectors.pooling import halving_budgets
from parcelray.models.connectors.routing import (
    bank_size,
    default_routing,
    resolve_routing,
    routed_budgets,
    split_budget,
)


def _route(low: int, high: int, side: int) -> RouteConfig:
    return RouteConfig(min_budget=low, max_budget=high, anchor_grid=side)


@pytest.mark.parametrize(
    ("grid_size", "budget", "split"),
    [
        (16, 16, (4, 16, 0)),
        (16, 63, (4, 16, 47)),
        (16, 64, (8, 64, 0)),
        (16, 256, (8, 64, 192)),
        (24, 63, (4, 16, 47)),
        (24, 64, (8, 64, 0)),
        (24, 576, (8, 64, 512)),
        (32, 16, (4, 16, 0)),
        (32, 255, (8, 64, 191)),
        (32, 256, (16, 256, 0)),
        (32, 1024, (16, 256, 768)),
    ],
)
def test_the_routing_of_the_paper(grid_size: int, budget: int, split: tuple[int, int, int]) -> None:
    assert split_budget(default_routing(grid_size), budget) == split


@pytest.mark.parametrize(("grid_size", "last", "bank"), [(16, 256, 192), (24, 576, 512), (32, 1024, 768)])
def test_the_routing_of_the_paper_covers_every_budget_with_one_bank(grid_size: int, last: int, bank: int) -> None:
    routing = default_routing(grid_size)
    assert routed_budgets(routing) == tuple(range(16, last + 1))
    assert bank_size(routing) == bank


def test_another_grid_needs_a_routing() -> None:
    with pytest.raises(UserError, match=r"no default routing for a patch grid of 12 x 12.*Set the `routing`"):
        resolve_routing(None, 12)
    assert resolve_routing((_route(9, 40, 3),), 24) == (_route(9, 40, 3),)


def test_gaps_are_legal() -> None:
    routing = resolve_routing((_route(4, 6, 2), _route(16, 17, 4)), 16)
    assert routed_budgets(routing) == (4, 5, 6, 16, 17)


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ((), "routing is empty"),
        ((_route(16, 64, 4), _route(64, 256, 8)), "64 to 256 follows 16 to 64"),
        ((_route(64, 256, 8), _route(16, 63, 4)), "16 to 63 follows 64 to 256"),
        ((_route(9, 40, 3),), "3 x 3 does not tile a patch grid of 16 x 16; legal sides are 1, 2, 4, 8, 16"),
        ((_route(1024, 1024, 32),), "32 x 32 does not tile a patch grid of 16 x 16"),
    ],
)
def test_bad_routing_is_refused_with_the_remedy(routing: tuple[RouteConfig, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_routing(routing, 16)


@pytest.mark.parametrize(
    ("grid_size", "budgets"),
    [(16, (4, 16, 64, 256)), (32, (4, 16, 64, 256, 1024)), (12, (9, 36, 144)), (7, (49,)), (2, (4,))],
)
def test_m3_budgets(grid_size: int, budgets: tuple[int, ...]) -> None:
    assert halving_budgets(grid_size) == budgets
    assert halving_budgets(grid_size, to_one=True) == (1, *budgets)


def test_m3_has_the_scales_of_its_release_on_llava() -> None:
    sizes = {"hidden_size": 24, "grid_size": 24, "mlp_width": 40}
    released = build_connector(M3ConnectorConfig(), **sizes, projector_layers=2)
    assert released.supported_budgets == (1, 9, 36, 144, 576)
    assert released.after_projector
    for connector in (
        build_connector(M3ConnectorConfig(), **sizes),
        build_connector(M3ConnectorConfig(variant="parcel_baseline"), **sizes, projector_layers=2),
    ):
        assert connector.supported_budgets == (9, 36, 144, 576)
        assert not connector.after_projector
