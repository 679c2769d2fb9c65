"""The cost table of `parcelray flops`."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from parcelray.config.connector import DualCrossAttentionConnectorConfig, M3ConnectorConfig
from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.profiling import cost_table


def test_the_table_has_a_row_for_every_budget_and_number_of_frames() -> None:
    table = cost_table.build("paligemma2-3b", budgets=(16, 64), frames=(1, 16))
    assert [(row.num_visual_tokens, row.num_frames, row.num_text_tokens) for row in table.rows] == [
        (16, 1, 129),
        (64, 1, 129),
        (16, 16, 65),
        (64, 16, 65),
    ]


def test_savings_are_against_all_patches_without_a_connector() -> None:
    (row,) = cost_table.build("paligemma2-3b", budgets=(16,), frames=(16,)).rows
    assert row.kv_saving == pytest.approx(1 - (16 * 16 + 65) / (16 * 256 + 65))
    assert row.flops_saving == pytest.approx(1 - row.cost.total / row.uncompressed.total)
    assert 0.75 < row.flops_saving < 0.85


def test_identity_saves_nothing_and_a_connector_at_full_budget_increases_the_cost() -> None:
    (identity,) = cost_table.build("paligemma2-3b", budgets=(256,), connector="identity").rows
    assert identity.flops_saving == 0
    assert identity.kv_saving == 0
    (parcel,) = cost_table.build("paligemma2-3b", budgets=(256,)).rows
    assert parcel.flops_saving < 0


def test_at_448_px_the_routing_uses_the_grid_of_that_resolution() -> None:
    table = cost_table.build("paligemma2-3b", resolution=448, budgets=(64, 256, 1024))
    assert table.backbone.num_patches == 1024
    assert [row.cost.connector > 0 for row in table.rows] == [False, False, True]


def test_json_contains_every_term_exactly() -> None:
    table = cost_table.build("paligemma2-3b", budgets=(256,))
    content = json.loads(table.to_json())
    assert content["backbone"]["text_width"] == 2304
    assert content["connector"] == "parcel"
    assert "patch embedding" in content["left_out"]
    (row,) = content["rows"]
    assert sum(row["terms"].values()) == row["total_flops"] == 1_972_535_836_672


def test_the_printed_table_shows_terms_totals_and_savings() -> None:
    output = io.StringIO()
    Console(width=160, file=output).print(cost_table.build("paligemma2-3b", frames=(16,)).to_rich())
    text = " ".join(output.getvalue().split())
    for expected in (
        "connector self attention",
        "output head",
        "24.28",
        "KV cache, MB",
        "FLOPs saved",
        "16 frames",
        "Not counted: patch embedding",
    ):
        assert expected in text


def test_a_connector_can_be_given_as_configuration() -> None:
    table = cost_table.build("paligemma2-3b", connector=DualCrossAttentionConnectorConfig(), budgets=(100,))
    assert table.connector == "dual_cross_attention"


def test_every_connector_can_be_given_by_name() -> None:
    for name in cost_table.CONNECTORS:
        budget = 16 if name == "anchors_only" else 256
        (row,) = cost_table.build("paligemma2-3b", connector=name, budgets=(budget,)).rows
        assert row.cost.total > 0


def test_m3_projects_all_patches_of_llava_before_it_pools_them() -> None:
    released = cost_table.build("llava-1.5-7b", connector="m3", budgets=(1, 9, 36, 144, 576)).rows
    per_token = 2 * (1024 * 4096 + 4096 * 4096)
    assert [row.cost.projection for row in released] == [576 * per_token] * 5
    baseline = M3ConnectorConfig(variant="parcel_baseline")
    (row,) = cost_table.build("llava-1.5-7b", connector=baseline, budgets=(9,)).rows
    assert row.cost.projection == 9 * per_token
    (linear,) = cost_table.build("paligemma2-3b", connector="m3", budgets=(16,)).rows
    assert linear.cost.projection == 2 * 16 * 1152 * 2304


def test_text_tokens_can_be_given() -> None:
    (row,) = cost_table.build("paligemma2-3b", budgets=(16,), text_tokens=10).rows
    assert row.num_text_tokens == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"connector": "parcl"},
            r"Unknown connector 'parcl': choose one of identity, parcel, mqt, m3, .*; did you mean parcel\?",
        ),
        ({"budgets": ()}, "No budget"),
        ({"frames": (0,)}, "0 frames"),
        ({"resolution": 225}, "not a multiple of the patch size 14"),
        ({"resolution": 112}, "no default routing for a patch grid of 8 x 8"),
        ({"text_tokens": -1}, "-1 text tokens"),
    ],
)
def test_illegal_arguments_are_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cost_table.build("paligemma2-3b", **arguments)


@pytest.mark.parametrize(
    ("connector", "budgets"),
    [("parcel", [16, 64, 256]), ("mqt", [16, 64, 256]), ("m3", [1, 9, 36, 144, 576]), ("identity", [576])],
)
def test_the_default_budgets_are_some_that_the_connector_supports(connector: str, budgets: list[int]) -> None:
    assert [row.num_visual_tokens for row in cost_table.build("llava-1.5-7b", connector=connector).rows] == budgets


def test_an_unsupported_budget_is_rejected_with_the_legal_budgets() -> None:
    with pytest.raises(
        UnsupportedBudgetError,
        match="m3 does not support 100 visual tokens per image; legal budgets are 4, 16, 64, 256",
    ):
        cost_table.build("paligemma2-3b", connector="m3", budgets=(100,))
