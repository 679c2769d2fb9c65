"""The cost table of `parcelray flops --reducer`, for every reducer and both backbone families."""

import io
from typing import Any

import pytest
from rich.console import Console

from parcelray.config.reducer import PruMergeConfig
from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.profiling.reduction_table import REDUCERS, ReductionTable, build_reduced

IN_DECODER = ("fastv", "pyramid_drop", "sparsevlm")


def _printed(table: ReductionTable, width: int = 120) -> str:
    output = io.StringIO()
    Console(width=width, file=output).print(table.to_rich())
    return output.getvalue()


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize(("backbone", "patches", "layers"), [("llava-1.5-7b", 576, 32), ("paligemma2-3b", 256, 26)])
def test_every_reducer_has_a_cost_at_64_tokens(backbone: str, patches: int, layers: int, reducer: str) -> None:
    table = build_reduced(backbone, reducer, budgets=(64, patches))
    reduced, full = table.to_dict()["rows"]
    assert sum(reduced["terms"].values()) == reduced["total_flops"] < reduced["uncompressed_flops"]
    assert reduced["reducer_flops"] == reduced["terms"]["reducer"] >= 0
    by_layer = reduced["visual_tokens_by_layer"]
    assert len(by_layer) == layers
    assert 62.5 < sum(by_layer) / layers <= 64
    assert (by_layer[0] == patches) == (reducer in IN_DECODER)
    assert full["total_flops"] == full["uncompressed_flops"]
    assert full["reducer_flops"] == 0
    text = _printed(table)
    assert f"{patches} -> 64" in text
    assert f"reducer {reducer}" in text
    assert ("64 x 32" if layers == 32 else "64 x 26") in text or reducer in IN_DECODER


@pytest.mark.parametrize("reducer", REDUCERS)
def test_illegal_budgets_are_rejected_with_the_legal_ones(reducer: str) -> None:
    illegal = {0, -3, 577} | ({1, 17} if reducer in IN_DECODER else set())
    for budget in illegal:
        with pytest.raises(UnsupportedBudgetError, match=f"{reducer} does not support {budget} visual tokens") as found:
            build_reduced("llava-1.5-7b", reducer, budgets=(budget,))
        assert "legal budgets are" in str(found.value)
    if reducer == "average_pooling":
        with pytest.raises(UnsupportedBudgetError, match="does not support 65 visual tokens"):
            build_reduced("llava-1.5-7b", reducer, budgets=(65,))


def test_the_layers_of_a_reducer_inside_the_decoder_are_printed() -> None:
    text = _printed(build_reduced("llava-1.5-7b", "fastv", budgets=(64,)))
    assert "576 x 2" in text
    assert "29 x 30" in text


def test_a_reducer_can_have_settings() -> None:
    assert build_reduced("llava-1.5-7b", "{type: prumerge, spatial: true}").reducer == PruMergeConfig(spatial=True)
    (late,) = build_reduced("llava-1.5-7b", "{type: fastv, layer: 3}").rows
    assert late.layers == "576 x 3, 11 x 29"


@pytest.mark.parametrize(
    ("reducer", "arguments", "message"),
    [
        ("fastvv", {}, r"Unknown reducer 'fastvv': choose one of cluster_aggregate, .*; did you mean fastv\?"),
        ("{type: prumerge, spatial: 3}", {}, r"The reducer '.*' is not legal: prumerge.spatial|spatial"),
        ("{type: tome, r: 8}", {}, "r: Extra inputs are not permitted"),
        ("[1, 2", {}, "Unknown reducer"),
        ("scope", {"frames": (0,)}, "0 frames"),
        ("scope", {"budgets": ()}, "No budget"),
        ("scope", {"text_tokens": -1}, "-1 text tokens"),
    ],
)
def test_illegal_arguments_are_rejected(reducer: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_reduced("llava-1.5-7b", reducer, **arguments)
