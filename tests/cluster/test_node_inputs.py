"""Plain paths of a job are compared on the nodes in use; each node is a folder that stands for its disk."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from parcelray.cluster import node_inputs
from parcelray.cluster.node_inputs import check_inputs
from parcelray.errors import UserError
from parcelray.models.checkpoint import ModelPin, resolve_checkpoint


@pytest.fixture
def model(tmp_path):
    """A model folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"weight": torch.ones(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def data(tmp_path):
    """A data folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "0.parquet").write_bytes(b"rows")
    return folder


def nodes(*changes):
    """Calls the check once on each node, after a change of its disk."""

    def each_node(check):
        results = []
        for change in changes:
            change()
            results.append(check())
        return results

    return each_node


def nothing():
    """Leaves the disk of a node as it is."""


def test_equal_content_on_every_node_passes(model, data):
    check_inputs([resolve_checkpoint(model).pin, None], [data, None, str(data)], nodes(nothing, nothing))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, data: shutil.rmtree(model), "model does not exist on the host .*; copy it to the same path on"),
        (lambda model, data: (model / "config.json").write_text("[1]"), "give every host the same files"),
        (lambda model, data: (data / "0.parquet").write_bytes(b"ROWS"), "data differ between the hosts: their digest"),
        (lambda model, data: shutil.rmtree(data), "data do not exist on the host .*; correct the path"),
    ],
)
def test_a_node_with_other_content_is_refused_with_one_sentence(model, data, change, message):
    pin = resolve_checkpoint(model).pin
    with pytest.raises(UserError, match=message):
        check_inputs([pin], [data], nodes(nothing, lambda: change(model, data)))


def test_references_are_not_compared_because_each_host_opens_them():
    pin = ModelPin(reference="hf:org/name@0123", digest="sha256:0")
    check_inputs([pin], [None], nodes(lambda: pytest.fail("a node was asked")))


def test_only_nodes_with_resources_for_workers_are_in_use(monkeypatch, data):
    alive = [
        {"NodeID": "head", "Alive": True, "Resources": {"CPU": 0.0}},
        {"NodeID": "gone", "Alive": False, "Resources": {"CPU": 4.0}},
        {"NodeID": "worker", "Alive": True, "Resources": {"CPU": 4.0}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: alive)
    assert [node["NodeID"] for node in node_inputs._nodes_in_use()] == ["worker"]


@pytest.mark.ray
def test_a_task_runs_on_each_node(ray_session, data):
    (problem,) = node_inputs._on_each_node(node_inputs._Check((), {str(data): "sha256:0"}))
    assert problem is not None
    assert problem.startswith(f"The data {data} differ between the hosts")
    check_inputs([], [data])
