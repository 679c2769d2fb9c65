"""The commands of docs/cluster.md, as they are written, on three hosts; a host dies in the middle of the training.

The job files on the laptop are replaced by smaller ones of the same names. The results are compared with those of the
same jobs on one host.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import yaml

from ..hosts import HOME, MLFLOW_URL, PROJECT, RESTARTED, ROOT, RUNS, Host, Hosts, make_hosts, why_no_hosts
from ..processes import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.serving, pytest.mark.nightly, pytest.mark.timeout(7200)]
LIMIT_S = 3000.0
"""Longest time of one command in seconds."""

_BENCHMARKS = [{"name": "mini", "source": {"samples": 4}, "max_new_tokens": 8}]
_COMPUTE = {"rows_per_shard": 8}
SMALLER: dict[str, dict[str, Any]] = {
    "jobs/train/quickstart.yaml": {
        # Three workers of one CPU are on two hosts of two CPUs, and leave one for the data.
        "scaling": {"num_workers": 3},
        "training": {"steps": 24, "images_per_step": 12, "log_every_steps": 1},
        "validation": {"samples": 2, "budgets": [16]},
        "checkpointing": {"every_steps": 4},
        "report": {"samples": 4, "budgets": [16]},
    },
    "jobs/promote/mini.yaml": {
        "benchmarks": _BENCHMARKS,
        "budgets": [16, 64],
        # The load policy of the endpoint chooses only budgets that a gate has accepted.
        "gates": {"retention": {"overall": {16: 0, 64: 0}}},
        "compute": _COMPUTE,
    },
    "jobs/evaluate/champion.yaml": {"benchmarks": _BENCHMARKS, "budgets": ["blind", 16], "compute": _COMPUTE},
    "jobs/tune/cluster_count.yaml": {
        "base": {"benchmarks": [{"name": "mini", "source": {"split": "validation", "samples": 2}}]},
        "algorithm": {"type": "optuna", "trials": 2, "startup_trials": 1, "batch": 1},
    },
}
_DISTURBED = "submit jobs/train/quickstart.yaml $cluster --set register"

_RUN = """
    import json, sys
    from mlflow import MlflowClient
    client = MlflowClient()
    (experiment,) = [each for each in client.search_experiments() if each.name == "parcelray"]
    runs = client.search_runs([experiment.experiment_id], "attributes.run_name LIKE 'train-quickstart%'")
    (run,) = [each for each in runs if "mlflow.parentRunId" not in each.data.tags]
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    print(json.dumps({"status": run.info.status, "tags": run.data.tags, "steps": steps}))
"""
_STORED = """
    import json, sys, fsspec
    filesystem, path = fsspec.core.url_to_fs(sys.argv[1])
    print(json.dumps(filesystem.cat_file(path).decode()))
"""


class Block(NamedTuple):
    """One block of code of the page."""

    hosts: tuple[str, ...]
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a block for the shell."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def blocks() -> list[Block]:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n# on ([^\n]*)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    return [Block(tuple(names.split(" and ")), language, text) for language, names, text in found]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """The hosts, with an S3 server and an MLflow server, but without Ray."""
    if reason := why_no_hosts():
        pytest.skip(reason)
    with make_hosts(tmp_path_factory.mktemp("hosts")) as made:
        made.start_s3()
        made.start_mlflow()
        project = made.laptop.path(PROJECT)
        for name, changes in SMALLER.items():
            job = yaml.safe_load((project / name).read_text(encoding="utf-8")) | changes
            (project / name).write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
        (project / "docs").mkdir()
        shutil.copy(ROOT / "docs" / "scene.png", project / "docs")
        yield made


def test_the_walk_through(hosts: Hosts) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI"):
        # The page sets what it needs.
        del hosts.laptop.variables[name]
    settings: list[str] = []
    for block in blocks():
        for host in (each for name in block.hosts for each in hosts.all if each.name == name):
            if block.language == "python":
                answer = host.run(shlex.join(["python", "-c", block.text]), PROJECT, timeout_s=LIMIT_S)
                assert answer.strip(), "the endpoint gives an empty answer"
                continue
            for command in block.commands:
                if re.match(r"export |\w+=", command):
                    settings.append(command)
                else:
                    _run(hosts, host, settings, command)
    _compare_with_one_host(hosts)


def _run(hosts: Hosts, host: Host, settings: list[str], command: str) -> None:
    script = "\n".join([*settings, RESTARTED % command if command.startswith("ray start") else command])
    folder = PROJECT if host is hosts.laptop else HOME
    if _DISTURBED not in command:
        host.run(script, folder, timeout_s=LIMIT_S)
        return
    log = "training.log"
    training = host.start(script, folder, log=log)
    wait_until(lambda: hosts.num_checkpoints("train/quickstart-parcel") > 0, "there is a checkpoint", training, LIMIT_S)
    # A dead host sends nothing, not even the end of its connections.
    hosts.cut(hosts.workers[1])
    hosts.workers[1].kill()
    hosts.connect(hosts.workers[1])
    new = hosts.restart(1)
    _run(hosts, new, [], "ray start --address=head:6379")
    assert training.wait(timeout=LIMIT_S) == 0, (host.folder / log).read_text()


def _compare_with_one_host(hosts: Hosts) -> None:
    """The training that lost a host has the same weights, and the evaluation the same scores, as on one host."""
    hosts.laptop.variables["MLFLOW_TRACKING_URI"] = MLFLOW_URL
    run = hosts.laptop.python(_RUN)
    # The runs on this one host are in its own store.
    del hosts.laptop.variables["MLFLOW_TRACKING_URI"]
    assert run["status"] == "FINISHED"
    assert sorted(set(run["steps"])) == list(range(1, 25)), "a metric is missing"
    hosts.laptop.run("parcelray train jobs/train/quickstart.yaml", PROJECT, timeout_s=LIMIT_S)
    hosts.laptop.run(
        "parcelray evaluate jobs/evaluate/champion.yaml --set reference=null"
        " --set model.reference=runs/train/quickstart-parcel/model",
        PROJECT,
        timeout_s=LIMIT_S,
    )
    here = hosts.laptop.path(PROJECT) / "runs"
    for name in ("train/quickstart-parcel/model/manifest.json", "evaluate/champion/result.csv"):
        local = (here / name).read_text(encoding="utf-8")
        stored = hosts.laptop.python(_STORED, f"{RUNS}/{name}")
        if name.endswith(".json"):
            local, stored = (json.loads(text)["files"]["model.safetensors"] for text in (local, stored))
        assert stored == local, name
