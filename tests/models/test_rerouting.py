"""Writing the routing that a search found into a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from parcelray.config.connector import RouteConfig
from parcelray.errors import UserError
from parcelray.models.manifest import verify_manifest
from parcelray.models.vlm import connector_of, load_vlm, write_rerouted

from ..tiny import tiny_checkpoint

ROUTING = [
    RouteConfig(min_budget=4, max_budget=31, anchor_grid=2),
    RouteConfig(min_budget=32, max_budget=256, anchor_grid=0),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supernet over four anchor grids."""
    return tiny_checkpoint(
        tmp_path_factory.mktemp("supernet"),
        3,
        connector={"type": "parcel", "num_heads": 2, "anchor_grids": [0, 2, 4, 8]},
    )


def _with_grids(source: Path, target: Path, anchor_grids: list[int]) -> Path:
    """Copies a checkpoint as if it had been trained with other anchor grids; empty: not a supernet."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["connector"]["anchor_grids"] = anchor_grids
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_the_new_routing_applies_to_the_old_weights(source: Path, tmp_path: Path) -> None:
    target = write_rerouted(source, tmp_path / "routed", ROUTING, "tune-s")
    manifest = verify_manifest(target)
    assert (manifest.config, manifest.seed, manifest.extra["routing_found_by"]) == ({}, 3, "tune-s")
    assert connector_of(source).num_anchors(16) == 16
    connector = connector_of(target)
    assert (connector.num_anchors(16), connector.num_anchors(64), min(connector.supported_budgets)) == (4, 0, 4)
    features = torch.randn(1, 256, 24)
    with torch.inference_mode():
        chosen = load_vlm(source).eval().connector(features, num_visual_tokens=16, anchor_grid=2)
        routed = load_vlm(target).eval().connector(features, num_visual_tokens=16)
    assert torch.equal(chosen, routed)


def test_a_checkpoint_without_the_anchor_grids_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a supernet over splits"):
        write_rerouted(_with_grids(source, tmp_path / "plain", []), tmp_path / "routed", ROUTING, "s")
    with pytest.raises(UserError, match=r"anchor_grid 2 is not one of this parcel's anchor_grids"):
        write_rerouted(_with_grids(source, tmp_path / "other", [0, 4]), tmp_path / "routed", ROUTING, "s")
    assert not (tmp_path / "routed").exists()
