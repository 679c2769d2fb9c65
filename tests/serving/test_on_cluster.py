"""Tests an endpoint that is handed over to a cluster, and managed through the cluster's dashboard."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.cluster.test_jobs import Cluster, cluster, free_ports  # noqa: F401
from tests.serving.local import PATIENCE_S

pytestmark = [pytest.mark.serving, pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1800)]


def test_a_detached_endpoint_is_shown_updated_and_stopped_from_anywhere(
    cluster: Cluster,  # noqa: F811
    tmp_path: Path,
    repo_root: Path,
) -> None:
    (port,) = free_ports(1)

    def run(*arguments: str) -> str:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        ended = subprocess.run(
            [sys.executable, "-m", "parcelray.cli", *arguments],
            cwd=tmp_path,
            env={**variables, "RAY_AUTH_TOKEN": cluster.token, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def states() -> list[dict[str, Any]]:
        return list(json.loads(run("endpoint", "status", "--json", "--address", cluster.address)))

    def answered(**fields: Any) -> str:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=2, timeout=PATIENCE_S)
        answer = client.chat.completions.with_raw_response.create(
            model="mini", messages=[{"role": "user", "content": "how many"}], max_tokens=4, **fields
        )
        return str(answer.headers["x-model-version"])

    job = [str(repo_root / "jobs" / "serve" / "mini.yaml"), "--port", str(port), "--set", "tracking.uri=null"]
    # An update runs both versions for a moment, and the cluster has two CPUs.
    job += ["--set", "replicas.cpus=0.5"]
    output = run("serve", *job, "--detach", "--address", cluster.gcs)
    assert f"mini answers at http://127.0.0.1:{port}/v1 and keeps running" in output
    version = answered()
    (state,) = states()
    assert (state["name"], state["status"], state["url"]) == ("mini", "RUNNING", f"http://127.0.0.1:{port}")
    assert state["models"] == {version: "1 of 1 replicas run"}

    run("endpoint", "update", "mini", "--set", "budgets.offered=[16]", "--address", cluster.address)
    assert answered(extra_body={"visual_tokens": 16}) == version
    assert "mini" in run("endpoint", "status", "mini", "--address", cluster.address)

    reducer = ["--set", "model.connector=null", "--set", "reducer={type: cluster_aggregate}"]
    run("endpoint", "update", "mini", *reducer, "--address", cluster.address)
    assert answered(extra_body={"visual_tokens": 16}) == version
    (state,) = states()
    assert [reducer["type"] for reducer in state["reducers"].values()] == ["cluster_aggregate"]
    assert list(state["models"].values()) == ["1 of 1 replicas run"]

    run("endpoint", "stop", "mini", "--address", cluster.address)
    assert states() == []
