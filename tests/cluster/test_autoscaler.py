"""Capacity of a real cluster whose head has no CPUs and whose workers Ray's autoscaler starts, on this machine.

Ray's own class for such clusters runs `ray stop`, which ends every Ray of the machine. Here a `ray start` of the test
is ended by its process id.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from ..processes import LIMIT_S, end_session, wait_until
from ..training.conftest import TINY
from .test_jobs import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.nightly]


_START_ATTEMPTS = 6


class Autoscaled(NamedTuple):
    """A cluster of a head without CPUs and up to two workers of two CPUs, none of which runs at first."""

    gcs: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def autoscaled() -> Iterator[Autoscaled]:
    gcs, dashboard, agent, agent_grpc, environment_agent, metrics, client = free_ports(7)
    # pytest's own temporary folders are too long for Ray's socket names.
    with tempfile.TemporaryDirectory(prefix="pr", ignore_cleanup_errors=True) as folder:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))
        } | {
            "HOME": folder,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        autoscaler = {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
        config = Path(folder) / "autoscaling.json"
        config.write_text(json.dumps(_config(f"127.0.0.1:{gcs}")))
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
        command += ["--disable-usage-stats", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += [f"--autoscaling-config={config}", f"--port={gcs}", f"--dashboard-port={dashboard}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
        command += [f"--runtime-env-agent-port={environment_agent}", f"--metrics-export-port={metrics}"]
        command += [f"--ray-client-server-port={client}", "--object-store-memory=100000000"]
        head = _started(command, environment | autoscaler, Path(folder) / "start.log")
        try:
            yield Autoscaled(f"127.0.0.1:{gcs}", environment | {"PYTHONPATH": os.pathsep.join(sys.path)})
        finally:
            end_session(head.pid)
            head.wait()


def _started(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts the head; on a busy machine several times, because Ray gives its own processes only 30 s to start."""
    for _ in range(_START_ATTEMPTS):
        with log.open("wb") as output:
            head = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        wait_until(partial(_has_started_or_ended, head, log), "Ray has started")
        if head.poll() is None:
            return head
        end_session(head.pid)
    raise AssertionError(f"The head did not start: {log.read_text()}")


def _has_started_or_ended(head: subprocess.Popen[bytes], log: Path) -> bool:
    return b"Ray runtime started" in log.read_bytes() or head.poll() is not None


def _config(gcs: str) -> dict[str, Any]:
    node: dict[str, Any] = {"node_config": {}, "labels": {}}
    worker = {"CPU": 2, "object_store_memory": 100_000_000}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "autoscaled",
        "max_workers": 8,
        "provider": {
            # As `fake_multinode`, Ray would look for a file of defaults that its wheel does not contain.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": node | {"resources": {"CPU": 0}, "max_workers": 0},
            "cpu_worker": node | {"resources": worker, "min_workers": 0, "max_workers": 2},
        },
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 60,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{f"{name}_commands": [] for name in commands},
        "file_mounts_sync_continuously": False,
    }


def _train(cluster: Autoscaled, folder: Path, start: dict[str, Any], **scaling: float) -> tuple[int, str]:
    """Runs `parcelray train` on the cluster; returns its exit code and what it printed, in one line."""
    job = TINY | {"model": start, "storage": str(folder / "runs"), "tracking": {"uri": None}, "scaling": scaling}
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    command = [sys.executable, "-m", "parcelray.cli", "train", str(folder / "job.yaml"), "--address", cluster.gcs]
    done = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.timeout(1500)
def test_a_training_that_no_node_type_can_hold_is_refused_with_the_numbers(
    autoscaled: Autoscaled, tiny_start: dict[str, Any], tmp_path: Path
) -> None:
    code, printed = _train(autoscaled, tmp_path, tiny_start, num_workers=5, cpus_per_worker=1.5)
    assert code == 2, printed
    assert (
        "The training needs 5 workers of 1.5 CPU each and 1 data task of 0.5 CPU, but the Ray cluster has only a head"
        " node of 0 CPU and up to 2 cpu_worker of 2 CPU;" in printed
    )


DRIVER = """
import sys
import ray
from parcelray.cluster.capacity import Need, Part, await_capacity
from parcelray.cluster.session import ray_session
from parcelray.errors import UserError

def need(workers):
    return Need("The training", (Part(workers, "worker", {"CPU": 1.5}), Part(1, "task", {"CPU": 0.5})), "lower it")

with ray_session(sys.argv[1]) as session:
    print("NODES", len(ray.nodes()))
    try:
        await_capacity(need(5), 1.0, "scaling.wait_s", print)
    except UserError as error:
        print("REFUSED", error)
    await_capacity(need(2), 600.0, "scaling.wait_s", print)
    print("READY", len(ray.nodes()))
"""


@pytest.mark.timeout(1500)
def test_a_job_waits_for_nodes_that_start_and_is_refused_if_none_can_hold_it(autoscaled: Autoscaled) -> None:
    command = [sys.executable, "-c", DRIVER, autoscaled.gcs]
    done = subprocess.run(
        command, env=autoscaled.environment, capture_output=True, text=True, timeout=2 * LIMIT_S, check=False
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "NODES 1",
        "REFUSED The training needs 5 workers of 1.5 CPU each and 1 task of 0.5 CPU, but the Ray cluster has only a"
        " head node of 0 CPU and up to 2 cpu_worker of 2 CPU; lower it, or use a larger cluster.",
    ], done.stderr
    assert lines[2].startswith("Waiting for 3.5 CPU"), done.stderr
    assert lines[-1] == "READY 3", done.stdout + done.stderr
