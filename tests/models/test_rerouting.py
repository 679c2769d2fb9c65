"""A routing that a search found becomes part of a checkpoint."""

from pathlib import Path

import pytest
import torch

from parcelray.config.connector import RouteConfig
from parcelray.errors import UserError
from parcelray.models.checkpoint import verify_manifest
from parcelray.models.rerouting import write_rerouted
from parcelray.models.vlm import connector_of, load_vlm

from ..cluster.tiny import tiny_checkpoint

ROUTING = [RouteConfig(min_budget=4, max_budget=31, anchor_grid=2), RouteConfig(min_budget=32, max_budget=256, anchor_grid=0)]


def _checkpoint(folder: Path, **connector: object) -> Path:
    return tiny_checkpoint(folder, 3, connector={"type": "parcel", "num_heads": 2, **connector})


def test_the_new_routing_is_followed_with_the_old_weights(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path, anchor_grids=[0, 2, 4, 8])
    target = write_rerouted(source, tmp_path / "routed", ROUTING, "tune-s")
    manifest = verify_manifest(target)
    assert (manifest.config, manifest.seed, manifest.extra["routing_found_by"]) == ({}, 3, "tune-s")
    assert connector_of(source).num_anchors(16) == 16
    connector = connector_of(target)
    assert (connector.num_anchors(16), connector.num_anchors(64), min(connector.supported_budgets)) == (4, 0, 4)
    features = torch.randn(1, 256, 24)
    with torch.inference_mode():
        asked = load_vlm(source).eval().connector(features, num_visual_tokens=16, anchor_grid=2)
        routed = load_vlm(target).eval().connector(features, num_visual_tokens=16)
    assert torch.equal(asked, routed)


def test_a_checkpoint_that_is_no_supernet_or_lacks_a_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no supernet over splits"):
        write_rerouted(_checkpoint(tmp_path / "plain"), tmp_path / "routed", ROUTING, "s")
    with pytest.raises(UserError, match=r"2"):
        write_rerouted(_checkpoint(tmp_path / "other", anchor_grids=[0, 4]), tmp_path / "routed", ROUTING, "s")
    assert not (tmp_path / "routed").exists()
