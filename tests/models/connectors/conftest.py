"""Small connectors of every type, on the paper's two grids and on a grid that needs a routing."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

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
    RouteConfig,
    VitCrossAttentionConnectorConfig,
)
from parcelray.models.connectors import Connector, build_connector

WIDTH = 24
ROUTES_12 = (
    RouteConfig(min_budget=9, max_budget=20, anchor_grid=3),
    RouteConfig(min_budget=36, max_budget=60, anchor_grid=6),
)


@dataclass(frozen=True)
class Case:
    """A connector configuration and a grid size."""

    config: ConnectorConfig
    grid_size: int

    def build(self, width: int = WIDTH) -> Connector:
        return build_connector(self.config, hidden_size=width, grid_size=self.grid_size, mlp_width=40)

    def features(self, batch_size: int = 2, width: int = WIDTH) -> Tensor:
        return torch.randn(batch_size, self.grid_size**2, width)

    def some_budgets(self, connector: Connector) -> list[int]:
        """Returns the first, middle and last budget, and both sides of every gap and regime change."""
        budgets = connector.supported_budgets
        changes = [
            budget
            for before, after in pairwise(budgets)
            if connector.num_anchors(before) not in (before, connector.num_anchors(after))
            for budget in (before, after)
        ]
        return sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1], *changes})


def _cases(grid_size: int) -> list[Case]:
    """Every connector; those with a choice start locally on the large grid, at random on the small one, else both."""
    routing = ROUTES_12 if grid_size == 12 else None
    configs: list[ConnectorConfig] = [
        IdentityConnectorConfig(),
        ParcelConnectorConfig(num_heads=4, routing=routing),
        MqtConnectorConfig(num_heads=4, num_queries=48),
        MqtConnectorConfig(num_heads=4, num_queries=48, keys="position"),
        M3ConnectorConfig(),
        AnchorsOnlyConnectorConfig(anchor_grid=4),
        FixedAnchorsConnectorConfig(num_heads=4, anchor_grid=4, max_budget=64),
        VitCrossAttentionConnectorConfig(num_heads=4, routing=routing),
        DualCrossAttentionConnectorConfig(num_heads=4, routing=routing),
        MqtSelfAttentionConnectorConfig(num_heads=4, num_queries=48),
        M3SelfAttentionConnectorConfig(num_heads=4),
    ]
    random = [
        config.model_copy(update={"start": "random"}) for config in configs if "start" in type(config).model_fields
    ]
    fixed = [config for config in configs if "start" not in type(config).model_fields]
    chosen = {16: [*configs, *random], 32: configs, 12: [*fixed, *random]}[grid_size]
    return [Case(config, grid_size) for config in chosen]


def _name(case: Case) -> str:
    start = getattr(case.config, "start", "")
    keys = "-position" if getattr(case.config, "keys", "") == "position" else ""
    return f"{case.config.type}-{start}{keys}-{case.grid_size}"


@pytest.fixture(params=[*_cases(16), *_cases(32), *_cases(12)], ids=_name)
def case(request: pytest.FixtureRequest) -> Case:
    assert isinstance(request.param, Case)
    return request.param


@pytest.fixture(params=_cases(16), ids=_name)
def case_16(request: pytest.FixtureRequest) -> Case:
    assert isinstance(request.param, Case)
    return request.param


@pytest.fixture
def parcel() -> Connector:
    return build_connector(
        ParcelConnectorConfig(num_heads=4, start="random"), hidden_size=WIDTH, grid_size=16, mlp_width=40
    )
