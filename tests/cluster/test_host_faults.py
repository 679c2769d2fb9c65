"""Faults of hosts, processes, network, object store and MLflow server, compared with undisturbed runs."""

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest

from ..hosts import BUCKET, PROJECT, RUNS, Host, Hosts
from ..processes import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(7200)]
LIMIT_S = 3000.0
"""Longest time of one job in seconds."""
AWAY_S = 60.0
REFUSING_S = 30.0
CUT_S = 20.0
STEPS = 48

TRAIN: dict[str, Any] = {
    "kind": "train",
    "model": {"type": "checkpoint", "reference": "mini_base"},
    "connector": {"type": "parcel", "num_heads": 6},
    "data": {"type": "mini"},
    "budget": {"type": "uniform", "budgets": [16, 64]},
    "training": {"steps": STEPS, "images_per_step": 8, "log_every_steps": 1},
    "validation": {"samples": 2, "budgets": [16]},
    "checkpointing": {"every_steps": 2, "keep": 3},
    "scaling": {"num_workers": 2, "cpus_per_worker": 2, "max_failures": 8},
}
EVALUATE: dict[str, Any] = {
    "kind": "evaluate",
    "name": "faults",
    "model": {"type": "checkpoint", "reference": "mini_base"},
    "benchmarks": [{"name": "mini", "source": {"samples": 16}, "max_new_tokens": 8}],
    "budgets": ["blind", "full"],
    "compute": {"actors": 2, "rows_per_shard": 4},
}

_RESULT = """
    import json, sys, fsspec
    from mlflow import MlflowClient
    filesystem, path = fsspec.core.url_to_fs(sys.argv[1])
    result = json.loads(filesystem.cat_file(f"{path}/result.json"))
    manifest = json.loads(filesystem.cat_file(f"{path}/model/manifest.json"))
    client, run_id = MlflowClient(), result["mlflow_run_id"]
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "train/loss")]
    run = client.get_run(run_id)
    print(json.dumps({
        "weights": manifest["files"]["model.safetensors"]["sha256"], "losses": history, "status": run.info.status,
    }))
"""
# The newest folder of a checkpoint may be an upload that the driver's death has ended, so Ray Train's record is read.
_TRUNCATE = """
    import json, sys, fsspec
    filesystem, path = fsspec.core.url_to_fs(sys.argv[1])
    record = json.loads(filesystem.cat_file(f"{path}/checkpoint_manager_snapshot.json"))
    newest = record["latest_checkpoint_result"]["checkpoint_dir_name"]
    weights = f"{path}/{newest}/model/model.safetensors"
    filesystem.pipe_file(weights, filesystem.cat_file(weights)[: filesystem.size(weights) // 2])
    print(json.dumps(newest))
"""
_TABLE = """
    import json, sys, fsspec
    filesystem, path = fsspec.core.url_to_fs(sys.argv[1])
    print(json.dumps(filesystem.cat_file(path).decode()))
"""


def _kill(hosts: Sequence[Host], command: str) -> None:
    """Sends SIGKILL to the processes of some hosts whose command line has these words."""
    # The brackets keep the shell's own command line from matching.
    script = f"pkill --signal KILL --full --count '[{command[0]}]{command[1:]}' || true"
    assert sum(int(host.run(script)) for host in hosts) > 0, f"no process of {command}"


def _more_checkpoints(hosts: Hosts, run: str, process: Any) -> None:
    """Waits for two more checkpoints, so that the training goes on after the last fault."""
    before = hosts.num_checkpoints(run)
    wait_until(lambda: hosts.num_checkpoints(run) >= before + 2, "the training stores checkpoints", process, LIMIT_S)


def test_a_training_survives_all_faults_with_the_weights_of_an_undisturbed_one(hosts: Hosts) -> None:
    submit = f"parcelray submit {hosts.job_file(TRAIN | {'name': 'disturbed'})} --wait"
    run = "train/disturbed"
    training = hosts.laptop.start(submit, PROJECT, log="disturbed.log")
    _more_checkpoints(hosts, run, training)

    # While the MLflow server is away, a worker dies, and the object store refuses.
    stopped = time.monotonic()
    hosts.stop(hosts.mlflow)
    _more_checkpoints(hosts, run, training)
    _kill(hosts.workers[:1], "RayTrainWorker")
    _more_checkpoints(hosts, run, training)
    os.killpg(hosts.s3.pid, signal.SIGSTOP)
    time.sleep(max(REFUSING_S, stopped + AWAY_S - time.monotonic()))
    # The training waits, so no step is lost for the next faults.
    hosts.start_mlflow()
    os.killpg(hosts.s3.pid, signal.SIGCONT)
    _more_checkpoints(hosts, run, training)

    hosts.cut(hosts.workers[1])
    time.sleep(CUT_S)
    hosts.connect(hosts.workers[1])
    _more_checkpoints(hosts, run, training)

    # The driver dies, and the newest checkpoint is damaged.
    _kill([hosts.head], "parcelray.cli train")
    log = hosts.laptop.folder / "disturbed.log"
    assert training.wait(timeout=LIMIT_S) == 1, log.read_text()
    assert "The worker of rank" in log.read_text()
    identity = hosts.laptop.run("parcelray jobs list --json | grep -o 'train-disturbed-[0-9a-f]*' | head -1", PROJECT)
    hosts.laptop.python(_TRUNCATE, f"{RUNS}/{run}/{identity.strip()}")
    output = hosts.laptop.run(submit, PROJECT, timeout_s=LIMIT_S)
    assert "is damaged; the one before it is used" in output
    assert "The training resumes after step" in output

    hosts.laptop.run(
        f"parcelray submit {hosts.job_file(TRAIN | {'name': 'undisturbed'})} --wait", PROJECT, timeout_s=LIMIT_S
    )
    disturbed, undisturbed = (
        hosts.laptop.python(_RESULT, f"{RUNS}/train/{name}") for name in ("disturbed", "undisturbed")
    )
    assert disturbed["weights"] == undisturbed["weights"]
    assert disturbed["status"] == "FINISHED"
    assert dict(disturbed["losses"]) == dict(undisturbed["losses"])
    assert sorted(dict(disturbed["losses"])) == list(range(1, STEPS + 1))


def test_an_evaluation_computes_only_what_killed_workers_and_a_killed_driver_lose(hosts: Hosts) -> None:
    submit = f"parcelray submit {hosts.job_file(EVALUATE)} --wait"
    evaluation = hosts.laptop.start(submit, PROJECT, log="evaluation.log")
    _more_predictions(hosts, evaluation)
    _kill(hosts.workers, "MapWorker")
    _more_predictions(hosts, evaluation)
    _kill([hosts.head], "parcelray.cli evaluate")
    assert evaluation.wait(timeout=LIMIT_S) == 1, (hosts.laptop.folder / "evaluation.log").read_text()
    stored = hosts.num_stored("predictions")
    output = hosts.laptop.run(submit, PROJECT, timeout_s=LIMIT_S)
    assert " 0 reused" not in output
    assert stored > 0
    elsewhere = EVALUATE | {"name": "undisturbed", "storage": f"s3://{BUCKET}/undisturbed"}
    hosts.laptop.run(f"parcelray submit {hosts.job_file(elsewhere)} --wait", PROJECT, timeout_s=LIMIT_S)
    assert hosts.laptop.python(_TABLE, f"{RUNS}/evaluate/faults/result.csv") == hosts.laptop.python(
        _TABLE, f"s3://{BUCKET}/undisturbed/evaluate/undisturbed/result.csv"
    )


def _more_predictions(hosts: Hosts, process: Any) -> None:
    before = hosts.num_stored("predictions")
    wait_until(lambda: hosts.num_stored("predictions") > before, "the evaluation stores predictions", process, LIMIT_S)
