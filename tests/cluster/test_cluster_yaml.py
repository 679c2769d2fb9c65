"""ray_cluster.yaml passes Ray's validator and has the properties that its comments state."""

from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

PATH = Path(__file__).parents[2] / "ray_cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded = yaml.safe_load(PATH.read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_rays_schema_accepts_the_file(cluster: dict[str, Any]) -> None:
    validate_config(cluster)
    validate_config(prepare_config(cluster))


def test_rays_schema_rejects_a_misspelled_key(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(cluster | {"max_worker": 3})


def test_the_head_runs_no_work(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in cluster["head_start_ray_commands"][-1]


def test_cpu_and_gpu_workers_have_bounds(cluster: dict[str, Any]) -> None:
    cpu, gpu = cluster["available_node_types"]["cpu_worker"], cluster["available_node_types"]["gpu_worker"]
    assert "GPU" not in cpu["resources"]
    assert gpu["resources"]["GPU"] >= 1
    assert all(0 <= node["min_workers"] <= node["max_workers"] for node in (cpu, gpu))
    assert cpu["max_workers"] + gpu["max_workers"] <= cluster["max_workers"]


def test_every_node_requires_the_token_and_the_dashboard_listens_on_loopback(cluster: dict[str, Any]) -> None:
    head, worker = cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]
    assert head.startswith("RAY_AUTH_MODE=token ")
    assert worker.startswith("RAY_AUTH_MODE=token ")
    assert "--dashboard-host=127.0.0.1" in head
    assert "--disable-usage-stats" in head
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN=" not in PATH.read_text()


def test_the_images_contain_the_locked_versions_of_ray_and_python(cluster: dict[str, Any]) -> None:
    images = [
        cluster["docker"]["head_image"],
        cluster["docker"]["worker_image"],
        cluster["available_node_types"]["gpu_worker"]["docker"]["worker_image"],
    ]
    locked = next(
        line for line in PATH.with_name("requirements.lock").read_text().splitlines() if line.startswith("ray==")
    )
    assert locked == f"ray=={metadata.version('ray')}"
    assert all(f":{locked.removeprefix('ray==')}-py311-" in image for image in images)
