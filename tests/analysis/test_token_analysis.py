"""The measures of anchors and query tokens against constructed connectors and closed forms."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from parcelray.analysis.redundancy import image_dependent_share
from parcelray.analysis.token_analysis import measure_budget, predicted_share
from parcelray.config.connector import M3ConnectorConfig
from parcelray.models.connectors.base import VisionDims
from parcelray.models.connectors.places import cell_centres
from parcelray.models.connectors.pooling import M3Connector, pool_grid

SIDE, ANCHORS = 4, 4


class _Scripted(M3Connector):
    """2 x 2 anchors on a 4 x 4 grid, and queries that read the patches with given attention."""

    def __init__(self, maps_QN: Tensor) -> None:
        super().__init__(M3ConnectorConfig(type="m3"), VisionDims(6, SIDE, 8))
        self.maps_QN = maps_QN
        self._supported_budgets = (ANCHORS + len(maps_QN),)

    def num_anchors(self, num_visual_tokens: int) -> int:
        return ANCHORS

    def token_places(self, num_visual_tokens: int, anchor_grid: int | None = None) -> tuple[int, ...]:
        return cell_centres(SIDE, 2) + tuple(self.maps_QN.argmax(dim=1).tolist())

    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        anchors_BPD = pool_grid(patch_features_BND, grid_size=SIDE, side=2)
        return torch.cat([anchors_BPD, self.maps_QN @ patch_features_BND], dim=1)

    def query_attention(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        return self.maps_QN.expand(len(patch_features_BND), -1, -1)


def _measures(maps_QN: Tensor) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, SIDE**2, 6, generator=generator) for count in (16, 8)]
    found = measure_budget(_Scripted(maps_QN), batches, ANCHORS + len(maps_QN))
    assert [each.part for each in found] == ["anchors", "queries", "all"]
    return {each.part: {name: value.value for name, value in each.measures.items()} for each in found}


def test_queries_that_read_whole_cells_repeat_the_anchors() -> None:
    cells_QN = torch.zeros(2, SIDE, SIDE)
    cells_QN[0, :2, :2] = cells_QN[1, 2:, :2] = 1 / 4
    queries = _measures(cells_QN.flatten(1))["queries"]
    expected = {
        "attention_entropy": math.log(4),
        "attention_entropy_share": 0.5,
        "attention_spread": math.log(2),
        "coverage": 0.5,
        "own_place": 4.0,
        "anchor_centres": 1.0,
        "anchor_overlap": 1.0,
        "attended_by_anchors": 1.0,
    }
    assert {name: queries[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert queries["tokens_by_anchors"] > 0.99


def test_queries_that_read_single_patches_carry_what_anchors_lack() -> None:
    # The three patches of each cell at which no anchor stands.
    places = [place for place in range(SIDE**2) if place not in cell_centres(SIDE, 2)]
    measured = _measures(torch.eye(SIDE**2)[places])
    queries = measured["queries"]
    assert queries["attention_entropy"] == pytest.approx(0, abs=1e-6)
    assert queries["attention_spread"] == pytest.approx(math.log(12), abs=1e-5)
    assert queries["coverage"] == pytest.approx(12 / 16, abs=1e-5)
    assert queries["own_place"] == pytest.approx(16)
    assert queries["anchor_centres"] == pytest.approx(0, abs=1e-6)
    # A single patch of 16, in a cell of 4: (1 / 4 - 1 / 16) / (1 - 1 / 16).
    assert queries["anchor_overlap"] == pytest.approx(0.2, abs=1e-5)
    assert queries["attended_by_anchors"] < 0.4
    assert queries["tokens_by_anchors"] < 0.4
    assert queries["tokens_by_patches"] > 0.99
    assert measured["all"]["effective_rank"] > measured["anchors"]["effective_rank"]


def test_the_share_from_the_image_is_that_of_the_training_log() -> None:
    generator = torch.Generator().manual_seed(1)
    maps_QN = torch.randn(3, SIDE**2, generator=generator).softmax(dim=1)
    features = torch.randn(12, SIDE**2, 6, generator=generator) + torch.randn(SIDE**2, 6, generator=generator)
    connector = _Scripted(maps_QN)
    found = {each.part: each for each in measure_budget(connector, [features[:8], features[8:]], 7)}
    tokens = connector(features, num_visual_tokens=7)
    for part, own in (("anchors", tokens[:, :4]), ("queries", tokens[:, 4:]), ("all", tokens)):
        share = found[part].measures["image_share"]
        assert share.value == pytest.approx(float(image_dependent_share(own)), rel=1e-4)
        assert share.interval.low < share.value < share.interval.high


def test_a_model_without_queries_has_one_part() -> None:
    connector = M3Connector(M3ConnectorConfig(type="m3"), VisionDims(6, SIDE, 8))
    (found,) = measure_budget(connector, [torch.randn(8, SIDE**2, 6)], 4)
    assert (found.part, found.num_tokens) == ("anchors", 4)
    assert found.measures.keys() == {"effective_rank", "mean_cosine", "image_share"}


def test_a_linear_map_is_found_and_noise_is_not_predicted() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, noise = (torch.randn(40, 5, 8, generator=generator) for _ in range(2))
    constant = torch.randn(5, 8, generator=generator)
    tokens = inputs @ torch.randn(8, 8, generator=generator) + constant
    for target, low, high in ((tokens, 0.99, 1.0), (noise, -0.3, 0.05)):
        explained_I, total_I = predicted_share(inputs, target)
        assert low <= float(explained_I.sum() / total_I.sum()) <= high
    # Inputs that are equal in all images predict nothing.
    explained_I, _ = predicted_share(constant.expand(40, -1, -1), tokens)
    torch.testing.assert_close(explained_I, torch.zeros_like(explained_I), atol=1e-9, rtol=0)
