"""A supernet: one set of weights for every split of every budget."""

import pytest
import torch
from torch import Tensor

from parcelray.config.connector import ParcelConnectorConfig, RouteConfig
from parcelray.errors import UserError
from parcelray.models.connectors import Connector, build_connector

GRIDS = (0, 1, 2, 4, 8, 16)


def _connector(**changes: object) -> Connector:
    torch.manual_seed(0)
    return build_connector(
        ParcelConnectorConfig(num_heads=4, **changes), hidden_size=32, grid_size=16, mlp_width=64
    ).eval()


@pytest.fixture
def features() -> Tensor:
    return torch.randn(2, 256, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("anchor_grid", GRIDS)
@pytest.mark.parametrize("budget", [1, 16, 63, 256])
def test_every_split_gives_its_anchors_and_the_remaining_queries(
    anchor_grid: int, budget: int, features: Tensor
) -> None:
    connector = _connector(anchor_grids=GRIDS)
    if anchor_grid**2 > budget:
        with pytest.raises(UserError, match=f"cannot be split into {anchor_grid**2} anchors and queries"):
            connector(features, num_visual_tokens=budget, anchor_grid=anchor_grid)
        return
    with torch.no_grad():
        tokens = connector(features, num_visual_tokens=budget, anchor_grid=anchor_grid)
    assert tokens.shape == (2, budget, 32)
    if anchor_grid:
        pooled = (
            torch.nn.functional.avg_pool2d(features.transpose(1, 2).reshape(2, 32, 16, 16), 16 // anchor_grid)
            .flatten(2)
            .transpose(1, 2)
        )
        assert torch.allclose(tokens[:, : anchor_grid**2], pooled, atol=1e-6)


def test_a_supernet_includes_the_papers_split_and_follows_another_routing(features: Tensor) -> None:
    supernet = _connector(anchor_grids=GRIDS)
    with torch.no_grad():
        assert torch.equal(
            supernet(features, num_visual_tokens=40), supernet(features, num_visual_tokens=40, anchor_grid=4)
        )
        assert torch.equal(
            supernet(features, num_visual_tokens=100), supernet(features, num_visual_tokens=100, anchor_grid=8)
        )
    routing = (
        RouteConfig(min_budget=4, max_budget=99, anchor_grid=2),
        RouteConfig(min_budget=100, max_budget=256, anchor_grid=8),
    )
    chosen = _connector(anchor_grids=GRIDS, routing=routing)
    chosen.load_state_dict(supernet.state_dict())
    with torch.no_grad():
        assert torch.equal(
            chosen(features, num_visual_tokens=40), supernet(features, num_visual_tokens=40, anchor_grid=2)
        )
    assert chosen.supported_budgets[0] == 4


def test_anchor_grids_that_were_not_trained_are_refused(features: Tensor) -> None:
    with pytest.raises(UserError, match=r"anchor_grid 2 is not one of this parcel's anchor_grids \(none\)"):
        _connector()(features, num_visual_tokens=40, anchor_grid=2)
    with pytest.raises(UserError, match="an anchor grid of 3 x 3 does not tile"):
        _connector(anchor_grids=(3,))
