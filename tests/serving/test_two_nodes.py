"""An endpoint on two nodes of one machine: replicas and proxies on both, and the death of one node."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.test_jobs import free_ports
from tests.processes import LIMIT_S

pytestmark = [pytest.mark.serving, pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1800)]

DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
port = int(sys.argv[2])

from openai import OpenAI, OpenAIError
from ray.cluster_utils import Cluster
from rich.console import Console
from parcelray.serving.deployments import DriverCluster
from parcelray.serving.plan import pin
from parcelray.serving.run import endpoint
from tests.serving.local import PATIENCE_S, PATIENT, job_of, wait_until

def nodes_of_replicas():
    applications = DriverCluster().details()["applications"].values()
    models = [app["deployments"]["Model"] for app in applications if "Model" in app["deployments"]]
    return {each["node_id"] for model in models for each in model["replicas"] if each["state"] == "RUNNING"}

def nodes_of_proxies():
    proxies = DriverCluster().details()["proxies"]
    return {node for node, proxy in proxies.items() if proxy["status"] == "HEALTHY"}

def answers():
    # A new client has a new connection, which the kernel gives to one of the proxies of this machine.
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        try:
            client.chat.completions.create(
                model="mini", messages=[{"role": "user", "content": "how many"}], max_tokens=4
            )
        except OpenAIError:
            return False
    return True

if __name__ == "__main__":
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 10}
    head = {"num_cpus": 2, "_system_config": health, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(num_cpus=2)
    job = job_of(
        budgets={"offered": [16]},
        http={"port": port, "proxies": "every_node"},
        replicas={"min": 2, "max": 2, "cpus": 1.5},
        limits=PATIENT,
        tracking={"uri": None},
    )
    with endpoint(pin(job), address=cluster.address, console=Console(stderr=True)):
        wait_until(lambda: len(nodes_of_proxies()) == 2, "both proxies are ready")
        replicas, proxies = nodes_of_replicas(), nodes_of_proxies()
        all_answered = all(answers() for _ in range(12))
        cluster.remove_node(second, allow_graceful=False)
        wait_until(lambda: second.node_id not in nodes_of_replicas() | nodes_of_proxies(), "the dead node is noticed")
        wait_until(answers, "the other node answers")
        third = cluster.add_node(num_cpus=2)
        wait_until(lambda: third.node_id in nodes_of_replicas() & nodes_of_proxies(), "the new node takes over")
        answered_again = all(answers() for _ in range(12))
    print(json.dumps([len(replicas), replicas == proxies, all_answered, answered_again]))
    cluster.shutdown()
"""


def test_replicas_and_proxies_on_two_nodes_answer_and_are_replaced(repo_root: Path) -> None:
    (port,) = free_ports(1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(repo_root), str(port)],
        env=environment | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": os.environ["RAY_TMPDIR"]},
        capture_output=True,
        text=True,
        timeout=3 * LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [2, True, True, True]
