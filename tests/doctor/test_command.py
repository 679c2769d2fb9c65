"""`parcelray doctor`: what it checks for a job, its output and its exit code."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from parcelray.config.loader import load_job
from parcelray.doctor import run as doctor
from parcelray.doctor.finding import Finding

from ..cli.conftest import run as run
from ..training.conftest import TINY

CHECKS = [
    "Python",
    "versions",
    "cores",
    "memory",
    "shared memory",
    "disk",
    "ports",
    "GPU",
    "Ray",
    "MLflow",
    "storage",
    "cluster",
    "hub",
]
SECURITY = ["listening addresses", "file modes", "API keys", "secrets in files", "Ray's token", "known vulnerabilities"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """Replaces the checks by one finding of each status except `fail`; the test may append others."""
    findings = [
        Finding("Python", "pass", "3.11.7"),
        Finding("versions", "warn", "ray 2.60.1 instead of 2.60.0", "run pip"),
        Finding("hub", "skip", "nothing uses the hub"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda target, **_: iter(findings))
    return findings


def test_only_failures_change_the_exit_code(quick: list[Finding], run: Any) -> None:
    done = run("doctor")
    assert done.code == 0
    assert "warn  versions               ray 2.60.1 instead of 2.60.0\n      remedy: run pip\n" in done.out
    assert "Everything that is configured works." in done.out
    quick.append(Finding("Ray", "fail", "it does not start", "set RAY_TMPDIR"))
    done = run("doctor")
    assert done.code == 1
    assert "fail  Ray                    it does not start\n      remedy: set RAY_TMPDIR\n" in done.out
    assert done.out.endswith("failed: Ray\n")


def test_json_has_every_finding(quick: list[Finding], run: Any) -> None:
    quick.append(Finding("Ray", "fail", "it does not start", "set RAY_TMPDIR"))
    done = run("doctor", "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert report["passed"] is False
    assert [check["status"] for check in report["checks"]] == ["pass", "warn", "skip", "fail"]
    assert report["checks"][-1]["remedy"] == "set RAY_TMPDIR"


def test_a_job_file_that_is_not_legal_is_a_user_error(run: Any) -> None:
    assert run("doctor", "nowhere.yaml").code == 2


def test_the_target_is_what_a_job_uses(tmp_path: Path) -> None:
    default = doctor.target_of(None)
    assert (default.tracking_uri, default.storage, default.needs_gpus) == ("sqlite:///runs/mlflow.db", "runs", False)
    path = tmp_path / "job.yaml"
    job = TINY | {
        "model": {"type": "checkpoint", "reference": "hf:org/model@" + "0" * 40},
        "storage": "s3://bucket/runs",
        "tracking": {"uri": "http://127.0.0.1:5000"},
        "scaling": {"num_workers": 1, "gpus_per_worker": 1},
    }
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    target = doctor.target_of(load_job(path))
    assert target.storage == "s3://bucket/runs"
    assert target.tracking_uri == "http://127.0.0.1:5000"
    assert target.hub_models == ("org/model@" + "0" * 40,)
    assert target.needs_gpus


@pytest.mark.ray
def test_a_fresh_clone_passes(
    ray_session: None, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    target = doctor.target_of(None)
    findings = list(doctor.examine(target, address=None, security=True, folder=repo_root, job_file=None))
    assert [finding.check for finding in findings] == CHECKS + SECURITY
    # Memory and disk depend on what else runs on this machine, and file modes on who cloned the repository.
    checked = set(CHECKS) - {"memory", "shared memory", "disk"}
    assert [finding for finding in findings if finding.status == "fail" and finding.check in checked] == []
