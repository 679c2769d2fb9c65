"""PARCEL, MQT and the ablations: nesting, scale, capacity and cost."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from parcelray.config.base import StrictModel
from parcelray.config.connector import (
    AnchorsOnlyConnectorConfig,
    ConnectorConfig,
    DualCrossAttentionConnectorConfig,
    FixedAnchorsConnectorConfig,
    M3ConnectorConfig,
    M3SelfAttentionConnectorConfig,
    MqtConnectorConfig,
    MqtSelfAttentionConnectorConfig,
    ParcelConnectorConfig,
    RouteConfig,
    VitCrossAttentionConnectorConfig,
)
from parcelray.errors import UserError
from parcelray.models.connectors import Connector, build_connector
from parcelray.models.connectors.blocks import BlockDims, CrossAttentionBlock, sincos_positions

PARCEL_PARAMETERS = 20_780_624


def _siglip_parameters(config: ConnectorConfig) -> int:
    with torch.device("meta"):
        connector = build_connector(config, hidden_size=1152, grid_size=16, mlp_width=4304)
    return sum(parameter.numel() for parameter in connector.parameters())


def _build(config: ConnectorConfig, **sizes: Any) -> Connector:
    torch.manual_seed(0)
    return build_connector(config, **({"hidden_size": 24, "grid_size": 16, "mlp_width": 40} | sizes)).eval()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ParcelConnectorConfig(start="random"), PARCEL_PARAMETERS),
        # 192 codes of places more, and no output norm.
        (ParcelConnectorConfig(), PARCEL_PARAMETERS + 192 * 1152 - 2 * 1152),
        (MqtConnectorConfig(start="random"), 15_539_024),
        (MqtConnectorConfig(start="sincos"), 15_539_024),
        (MqtConnectorConfig(keys="position", start="random"), 15_539_024),
        (MqtConnectorConfig(), 15_539_024 + 256 * 1152 - 2 * 1152),
        (VitCrossAttentionConnectorConfig(start="random"), 15_465_296),
        (DualCrossAttentionConnectorConfig(start="random"), 20_782_928),
        (FixedAnchorsConnectorConfig(start="random"), 20_835_920),
        (MqtSelfAttentionConnectorConfig(start="random"), 20_854_352),
        (M3SelfAttentionConnectorConfig(), 20_852_048),
        (M3ConnectorConfig(), 0),
        (AnchorsOnlyConnectorConfig(), 0),
    ],
    ids=lambda value: (
        "-".join([getattr(value, "type", ""), getattr(value, "start", "")]) if isinstance(value, StrictModel) else ""
    ),
)
def test_parameter_counts_at_siglip_so400m_size(config: ConnectorConfig, expected: int) -> None:
    assert _siglip_parameters(config) == expected
    if config.type in {"mqt_self_attention", "m3_self_attention"}:
        assert abs(expected / PARCEL_PARAMETERS - 1) < 0.01


@pytest.mark.parametrize(("budget", "num_queries"), [(64, 0), (16, 0), (63, 47), (65, 1), (256, 192)])
def test_the_flops_of_parcel_match_the_paper(budget: int, num_queries: int) -> None:
    """Connector term of Appendix C, at D = 1152 and M = 4304."""
    with torch.device("meta"):
        connector = build_connector(ParcelConnectorConfig(), hidden_size=1152, grid_size=16, mlp_width=4304)
        features = torch.empty(1, 256, 1152)
    with FlopCounterMode(display=False) as counter:
        connector(features, num_visual_tokens=budget)
    width, mlp = 1152, 4304
    self_attention = 8 * budget * width**2 + 4 * budget**2 * width
    cross_attention = 4 * (num_queries + 256) * width**2 + 4 * num_queries * 256 * width
    expected = self_attention + cross_attention + 4 * num_queries * width * mlp if num_queries else 0
    assert counter.get_total_flops() == expected


def test_mqt_tokens_of_a_small_budget_are_a_prefix_of_a_large_ones() -> None:
    for keys in ("content", "position"):
        connector = _build(MqtConnectorConfig.model_validate({"num_heads": 4, "keys": keys}))
        features = torch.randn(2, 256, 24)
        with torch.no_grad():
            full = connector(features, num_visual_tokens=256)
            for budget in (1, 7, 64, 255):
                # Normed tokens have values of about 1; a dozen kernels round them by 1e-7 each, differently for each
                # budget.
                torch.testing.assert_close(
                    connector(features, num_visual_tokens=budget), full[:, :budget], atol=1e-5, rtol=1e-5
                )


def test_parcel_regimes_share_the_first_rows_of_one_bank(parcel: Any) -> None:
    """Row 0 of the bank changes the first query of both regimes; row 1 has no effect with one query."""
    features = torch.randn(1, 256, 24)
    bank = parcel.query_path.bank.weight
    assert bank.shape == (192, 24)
    with torch.no_grad():
        before = {budget: parcel(features, num_visual_tokens=budget) for budget in (17, 65, 66)}
        bank[1] += torch.randn(24)
        after_row_1 = {budget: parcel(features, num_visual_tokens=budget) for budget in (17, 65, 66)}
        bank[0] += torch.randn(24)
        after_row_0 = {budget: parcel(features, num_visual_tokens=budget) for budget in (17, 65)}
    for budget in (17, 65):
        torch.testing.assert_close(after_row_1[budget], before[budget])
        assert not torch.allclose(after_row_0[budget][:, -1], before[budget][:, -1])
        torch.testing.assert_close(after_row_0[budget][:, :-1], before[budget][:, :-1])
    assert not torch.allclose(after_row_1[66], before[66])


def test_parcel_is_not_nested_across_budgets(parcel: Any) -> None:
    """All queries attend to one another, so a KV cache must not be reused across budgets."""
    features = torch.randn(1, 256, 24)
    with torch.no_grad():
        small, large = parcel(features, num_visual_tokens=65), parcel(features, num_visual_tokens=66)
    assert (small[:, 64] - large[:, 64]).abs().max() > 1e-4


def test_queries_depend_on_the_anchors_only_with_conditioning() -> None:
    """The gradient of the queries with respect to the anchors is nonzero in parcel and dual cross-attention.

    In the ablation without conditioning there is none.
    """
    anchors = torch.randn(1, 16, 24, requires_grad=True)
    features = torch.randn(1, 256, 24)
    for config, is_aware in (
        (ParcelConnectorConfig(num_heads=4, start="random"), True),
        (DualCrossAttentionConnectorConfig(num_heads=4, start="random"), True),
        (VitCrossAttentionConnectorConfig(num_heads=4, start="random"), False),
    ):
        path = _build(config).get_submodule("query_path")
        tokens = path(anchors, features, 8)
        (gradient,) = torch.autograd.grad(tokens.pow(3).sum(), anchors, allow_unused=True)
        assert (gradient is not None and bool(gradient.abs().max() > 0)) == is_aware


def test_position_keys_read_the_same_patches_in_every_image() -> None:
    first, second = torch.randn(2, 1, 256, 24)
    content, position = (
        _build(MqtConnectorConfig.model_validate({"num_heads": 4, "keys": keys})) for keys in ("content", "position")
    )
    with torch.no_grad():
        torch.testing.assert_close(
            position.query_attention(first, num_visual_tokens=9), position.query_attention(second, num_visual_tokens=9)
        )
        assert not torch.allclose(
            content.query_attention(first, num_visual_tokens=9), content.query_attention(second, num_visual_tokens=9)
        )


def test_cross_attention_ignores_the_order_only_without_positions() -> None:
    torch.manual_seed(0)
    block = CrossAttentionBlock(BlockDims(width=24, num_heads=4, mlp_width=40, layer_norm_eps=1e-6), with_mlp=True)
    queries, context, order = torch.randn(1, 5, 24), torch.randn(1, 256, 24), torch.randperm(256)
    positions = sincos_positions(16, 24, like=context)
    with torch.no_grad():
        torch.testing.assert_close(block(queries, context[:, order]), block(queries, context), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(
            block(queries, context[:, order], positions), block(queries, context, positions), atol=1e-3
        )
        torch.testing.assert_close(
            block(queries, context[:, order], positions[order]),
            block(queries, context, positions),
            atol=1e-5,
            rtol=1e-5,
        )


def test_sincos_positions_by_hand() -> None:
    """Grid side 2, width 8: two octaves of sine, then cosine; the row before the column."""
    positions = sincos_positions(2, 8, like=torch.zeros(1))
    angles = torch.tensor([1.0, 0.01])
    one, zero = torch.cat([angles.sin(), angles.cos()]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    expected = torch.stack([torch.cat(pair) for pair in ((zero, zero), (zero, one), (one, zero), (one, one))])
    torch.testing.assert_close(positions, expected)
    assert len({tuple(row.tolist()) for row in sincos_positions(32, 24, like=torch.zeros(1))}) == 1024


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_match_scale_starts_learned_tokens_at_the_scale_of_the_patch_features(case_16: Any, scale: float) -> None:
    connector = case_16.build(width=48)
    norm = nn.LayerNorm(48)
    with torch.no_grad():
        norm.weight.copy_(scale * (1 + 0.5 * torch.rand(48)))
        norm.bias.copy_(0.3 * scale * torch.randn(48))
        features = norm(torch.randn(4, 256, 48))
        connector.match_scale(norm.weight, norm.bias)
        budget = connector.supported_budgets[-1]
        tokens = connector(features, num_visual_tokens=budget)
        is_query_free = connector.name in {"identity", "m3", "anchors_only"}
        learned = (
            tokens
            if is_query_free
            else tokens[:, 0 if connector.name == "m3_self_attention" else connector.num_anchors(budget) :]
        )
    if learned.shape[1] and connector.name != "anchors_only":
        ratio = learned.pow(2).mean().sqrt() / features.pow(2).mean().sqrt()
        assert 0.5 < ratio < 2


def test_match_scale_without_a_bias_starts_at_bias_zero(parcel: Any) -> None:
    parcel.match_scale(torch.full((24,), 3.0), torch.ones(24))
    parcel.match_scale(torch.full((24,), 2.0), None)
    assert parcel.query_path.output_norm.weight.tolist() == [2.0] * 24
    assert parcel.query_path.output_norm.bias.abs().sum() == 0


def test_queries_start_diverse() -> None:
    """The mean pairwise cosine of an image's query tokens is low, on features with a large common mean.

    It is 0.36 to 0.68 over three seeds and two widths. With a bank of standard deviation 0.02, it would be 0.94 to
    1.00: every query would be little more than the mean of the patches.
    """
    features = torch.randn(1, 256, 96) + 2 * torch.randn(96)
    for config in (
        ParcelConnectorConfig(num_heads=4, start="random"),
        MqtConnectorConfig(num_heads=4, start="random"),
        DualCrossAttentionConnectorConfig(num_heads=4, start="random"),
    ):
        connector = _build(config, hidden_size=96)
        with torch.no_grad():
            tokens = connector(features, num_visual_tokens=256)[0, connector.num_anchors(256) :]
        cosines = F.normalize(tokens, dim=-1) @ F.normalize(tokens, dim=-1).T
        num_queries = len(tokens)
        assert (cosines.sum() - num_queries) / (num_queries * (num_queries - 1)) < 0.8


def test_a_routing_that_never_uses_queries_has_no_parameters() -> None:
    connector = _build(
        ParcelConnectorConfig(num_heads=4, routing=(RouteConfig(min_budget=64, max_budget=64, anchor_grid=8),))
    )
    assert not list(connector.parameters())
    assert connector(torch.randn(1, 256, 24), num_visual_tokens=64).shape == (1, 64, 24)
    assert connector.query_attention(torch.randn(1, 256, 24), num_visual_tokens=64).shape == (1, 0, 256)


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (ParcelConnectorConfig(num_heads=5), {}, "num_heads 5 does not divide the vision width 24"),
        (
            MqtConnectorConfig(num_heads=8),
            {},
            "num_heads 8 gives heads of width 3, but the local start needs at least 4",
        ),
        (MqtConnectorConfig(num_heads=2), {"hidden_size": 26}, "vision width 26 is not a multiple of 4"),
        (
            FixedAnchorsConnectorConfig(num_heads=4, anchor_grid=8, max_budget=32),
            {},
            "max_budget 32 is below the 64 anchors",
        ),
        (
            FixedAnchorsConnectorConfig(num_heads=4, anchor_grid=5),
            {},
            "5 x 5 does not tile a patch grid of 16 x 16; legal sides are 1, 2, 4, 8, 16",
        ),
        (AnchorsOnlyConnectorConfig(anchor_grid=3), {"grid_size": 32}, "legal sides are 1, 2, 4, 8, 16, 32"),
        (
            DualCrossAttentionConnectorConfig(
                num_heads=4, routing=(RouteConfig(min_budget=1, max_budget=9, anchor_grid=0),)
            ),
            {},
            "interval 1 to 9 has anchor_grid 0",
        ),
    ],
)
def test_configurations_that_do_not_match_the_vision_tower_are_refused(
    config: ConnectorConfig, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _build(config, **sizes)
