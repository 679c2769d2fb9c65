"""A training on three hosts without a shared disk: results are in the bucket and on the MLflow server."""

from typing import Any

import pytest

from parcelray.tracking.lineage import JOB_TAG, MODEL_IN_TAG

from ..hosts import PROJECT, RUNS, TMP, Hosts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

TRAIN: dict[str, Any] = {
    "kind": "train",
    "name": "short",
    "model": {"type": "checkpoint", "reference": "mini_base"},
    "connector": {"type": "parcel", "num_heads": 6},
    "data": {"type": "mini"},
    "budget": {"type": "uniform", "budgets": [16, 64]},
    "training": {"steps": 3, "images_per_step": 8, "log_every_steps": 1},
    "validation": {"samples": 2, "budgets": [16]},
    "checkpointing": {"every_steps": 3},
    # Each worker is on a host of its own: two do not fit the three CPUs of a host.
    "scaling": {"num_workers": 2, "cpus_per_worker": 2},
}

_MODEL = """
    import json, sys, fsspec
    filesystem, path = fsspec.core.url_to_fs(sys.argv[1])
    manifest = json.loads(filesystem.cat_file(f"{path}/model/manifest.json"))
    sizes = {name: filesystem.size(f"{path}/model/{name}") for name in manifest["files"]}
    result = json.loads(filesystem.cat_file(f"{path}/result.json"))
    print(json.dumps({"sizes": sizes, "metrics": result["metrics"], "run": result["mlflow_run_id"]}))
"""

_RUN = """
    import json, sys
    from mlflow import MlflowClient
    client = MlflowClient()
    run = client.get_run(sys.argv[1])
    steps = [metric.step for metric in client.get_metric_history(sys.argv[1], "train/loss")]
    print(json.dumps({"status": run.info.status, "tags": run.data.tags, "steps": steps}))
"""


def test_a_submitted_training_leaves_its_model_in_the_bucket_and_its_metrics_on_the_server(hosts: Hosts) -> None:
    job = hosts.job_file(TRAIN)
    output = hosts.laptop.run(f"parcelray submit {job} --wait", PROJECT, timeout_s=900)
    stored = hosts.laptop.python(_MODEL, f"{RUNS}/train/short")
    assert stored["sizes"]["model.safetensors"] > 10**6, output
    assert stored["metrics"]["val/score@16"] >= 0
    run = hosts.laptop.python(_RUN, stored["run"])
    assert (run["status"], run["steps"]) == ("FINISHED", [1, 2, 3])
    assert run["tags"][JOB_TAG].startswith("train-short-")
    assert run["tags"][MODEL_IN_TAG].startswith("sha256:")
    # Ray Train keeps a log of each worker on the host where it ran.
    for worker in hosts.workers:
        worker.run(f"ls {TMP}/ray/session_latest/logs/train/ray-train-app-worker-*")
