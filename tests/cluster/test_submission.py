"""What is submitted: commands, secrets, and the versions that a cluster must have. No cluster is needed."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.job_submission import JobStatus

import parcelray
from parcelray.cluster import jobs
from parcelray.cluster.package import secret_settings
from parcelray.cluster.submission import JobRequest, build_entrypoint, driver_variables, plan_submission
from parcelray.cluster.versions import Needs, Versions, check_versions, needs_of
from parcelray.errors import UserError

# Concatenated, so that this file itself passes the check for secrets.
ACCESS_TOKEN = "hf_" + "a1B2" * 9
PASSWORD_URL = "http://me:" + "hunter2@mlflow:5000"
ADDRESS = "http://127.0.0.1:1"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("jobs/a.yaml", "pipelines/search.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("kind: train\n")
    for arguments in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "identity", "flags", "command"),
    [
        ("jobs/a.yaml", "train-a-00000000", [], "python -m parcelray.cli train jobs/a.yaml --set x=1"),
        ("jobs/a.yaml", "evaluate-a-00000000", [], "python -m parcelray.cli evaluate jobs/a.yaml --set x=1"),
        ("jobs/a.yaml", "tune-a-00000000", [], "python -m parcelray.cli tune jobs/a.yaml --set x=1 --resume"),
        (
            "jobs/a.yaml",
            "tune-a-00000000",
            ["--confirm"],
            "python -m parcelray.cli tune jobs/a.yaml --set x=1 --resume --confirm",
        ),
        ("jobs/a.yaml", "promote-a-00000000", [], "python -m parcelray.cli models promote jobs/a.yaml --set x=1"),
        ("jobs/a.yaml", "serve-a-00000000", [], "python -m parcelray.cli serve jobs/a.yaml --set x=1"),
        (
            "pipelines/search.py",
            "pipeline-search-00000000",
            ["--confirm"],
            "python pipelines/search.py --set x=1 --confirm",
        ),
    ],
)
def test_every_kind_of_job_has_its_command(
    project: Path, file: str, identity: str, flags: list[str], command: str
) -> None:
    request = JobRequest(project / file, identity, ["x=1"], flags)
    assert build_entrypoint(request, project) == command
    assert request.submission_id == identity + ("-confirm" if flags else "")


def test_files_that_a_job_reads_are_sent_although_git_does_not_track_them(project: Path) -> None:
    job, keys = project / "jobs" / "a.yaml", project / "keys.txt"
    keys.write_text("keys")
    plans = [
        plan_submission(JobRequest(job, "serve-a-00000000", further=each), address=ADDRESS) for each in ([], [keys])
    ]
    assert [plan.largest.keys() - {"jobs/a.yaml", "pipelines/search.py"} for plan in plans] == [set(), {"keys.txt"}]


def test_the_driver_of_an_endpoint_has_time_to_finish_its_requests() -> None:
    assert int(driver_variables("serve", {"A": "1"})["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert driver_variables("train", {"A": "1"}) == {"PYTHONUNBUFFERED": "1", "A": "1"}


def test_a_malformed_identity_is_rejected(project: Path) -> None:
    with pytest.raises(UserError, match="legal: KIND-NAME-HASH8"):
        plan_submission(JobRequest(project / "jobs" / "a.yaml", "train; rm -rf"), address=ADDRESS)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"tracking": {"uri": PASSWORD_URL}}, ["tracking.uri contains a URL with a password"]),
        ({"benchmarks": [{"source": {"login": ACCESS_TOKEN}}]}, ["benchmarks.0.source.login contains text that looks"]),
        (
            {"source": {"hf_token": "x", "api_key": "y"}},
            ["source.hf_token has the name", "source.api_key has the name"],
        ),
        ({"AWS_SECRET_ACCESS_KEY": "x", "AWS_ACCESS_KEY_ID": "y"}, ["AWS_SECRET_ACCESS_KEY has", "AWS_ACCESS_KEY_ID"]),
        (
            {"num_visual_tokens": 64, "keys": "keys.txt", "token_reduction": "fastv", "image_token": 7, "token": None},
            [],
        ),
        ({"storage": "s3://bucket/runs", "uri": "http://mlflow:5000/path@x", "budgets": [16, 64]}, []),
    ],
)
def test_secrets_in_settings_are_found_without_repeating_them(settings: Any, found: list[str]) -> None:
    lines = [f"{path} {reason}" for path, reason in secret_settings(settings)]
    assert len(lines) == len(found)
    for line, start in zip(lines, found, strict=True):
        assert line.startswith(start)
        assert "hunter2" not in line
        assert ACCESS_TOKEN not in line


def test_no_shipped_job_file_is_taken_for_one_with_secrets(repo_root: Path) -> None:
    files = sorted((repo_root / "jobs").glob("*/*.yaml"))
    assert files
    assert [(file.name, *found) for file in files for found in secret_settings(yaml.safe_load(file.read_text()))] == []


@pytest.mark.parametrize(
    ("overrides", "settings", "words"),
    [
        ([f"hub.login={ACCESS_TOKEN}"], {}, r"--set\.0 contains text that looks like an access token"),
        ([], {"tracking": {"uri": PASSWORD_URL}}, r"tracking\.uri contains a URL with a password, and anyone"),
    ],
)
def test_a_job_with_a_secret_is_rejected(
    project: Path, overrides: list[str], settings: dict[str, Any], words: str
) -> None:
    request = JobRequest(project / "jobs" / "a.yaml", "train-a-00000000", overrides, settings=settings)
    with pytest.raises(UserError, match=words):
        plan_submission(request, address=ADDRESS)


NEEDS = Needs(
    SpecifierSet(">=3.11"),
    [Requirement("transformers>=5.20,<6"), Requirement("Ray[train]>=2.60"), Requirement("tomli; python_version<'3'")],
)


@pytest.mark.parametrize(
    ("python", "libraries", "words"),
    [
        ("3.11.9", {"transformers": "5.21.0", "ray": "2.60.0"}, None),
        ("3.12.0", {"transformers": "5.23.0rc1", "ray": "2.61.0"}, None),
        ("3.10.2", {"transformers": "5.21.0", "ray": "2.60.0"}, r"has Python 3\.10\.2 \(needed: >=3\.11\)\. Install"),
        ("3.11.9", {"transformers": "4.57.1", "ray": "2.60.0"}, r"transformers 4\.57\.1 \(needed: .*; here: 5\."),
        ("3.11.9", {"ray": "2.9.0"}, r"transformers missing \(.*\), Ray 2\.9\.0 \("),
    ],
)
def test_versions_that_break_a_job_are_refused(python: str, libraries: dict[str, str], words: str | None) -> None:
    found = Versions(python, libraries)
    if words is None:
        check_versions(NEEDS, found, ADDRESS)
        return
    with pytest.raises(UserError, match=words):
        check_versions(NEEDS, found, ADDRESS)


def test_the_needs_of_a_project(project: Path, repo_root: Path) -> None:
    needs = needs_of(repo_root, package_is_sent=True)
    assert needs is not None
    assert {"torch", "mlflow", "ray"} <= {each.name for each in needs.libraries}
    assert "3.10" not in needs.python
    assert needs_of(project, package_is_sent=True) is None
    installed = needs_of(project, package_is_sent=False)
    assert installed is not None
    assert [str(each) for each in installed.libraries] == [f"parcelray=={parcelray.__version__}"]


def test_the_query_of_versions_is_not_listed_as_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("versions-6e5ac5680343", "train-a-0a1b2c3d")
    details = [
        JobDetails(type=JobType.SUBMISSION, submission_id=name, status=JobStatus.FAILED, entrypoint="python")
        for name in names
    ]
    monkeypatch.setattr(jobs, "_connect", lambda address: (ADDRESS, SimpleNamespace(list_jobs=lambda: details)))
    assert [state.submission_id for state in jobs.list_jobs(address=ADDRESS)] == ["train-a-0a1b2c3d"]


def test_a_killed_driver_is_named_by_its_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        "Job entrypoint command failed with exit code -9, last available logs (truncated to 20,000 chars):\nstep 1"
    )
    killed = JobDetails(
        type=JobType.SUBMISSION,
        submission_id="train-a-0a1b2c3d",
        status=JobStatus.FAILED,
        entrypoint="python",
        message=message,
        driver_exit_code=-9,
    )
    monkeypatch.setattr(jobs, "_connect", lambda address: (ADDRESS, SimpleNamespace(list_jobs=lambda: [killed])))
    assert jobs.list_jobs(address=ADDRESS)[0].message == "killed by signal 9: step 1"
