"""Comparison of a cluster's Python and libraries with what a job's code needs, before the job is sent.

The code of the project is sent with each job, the libraries are those of the cluster. A version within the bounds of
`pyproject.toml` is accepted, also if it differs from the one on this machine.
"""

import importlib.metadata
import json
import shlex
import time
import tomllib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from ray.job_submission import JobSubmissionClient

import parcelray
from parcelray.cluster.jobs import PROBE, start_job
from parcelray.errors import SystemFailure, UserError

PROBE_LIMIT_S = 120.0
_POLL_S = 0.5
_MARK = "parcelray-versions "
# Runs on the cluster, whose Python may be too old for the code of this package.
_PROBE = f"""
import json, platform, sys
from importlib.metadata import distributions
names = {{str(each.metadata["Name"]): each.version for each in distributions()}}
sys.stdout.write({_MARK!r} + json.dumps({{"python": platform.python_version(), "libraries": names}}) + "\\n")
"""


class Versions(NamedTuple):
    """Versions that are installed on a cluster."""

    python: str
    libraries: Mapping[str, str]
    """Version by canonical name."""


class Needs(NamedTuple):
    """Versions that the code of a job accepts."""

    python: SpecifierSet
    libraries: Sequence[Requirement]


def needs_of(root: Path, *, package_is_sent: bool) -> Needs | None:
    """Reads which versions a job needs.

    Args:
        root: root of the project that is sent.
        package_is_sent: whether the project contains parcelray itself. If not, the cluster must have the version of
            parcelray of this machine.

    Returns:
        The bounds of the project's `pyproject.toml`, or the version of parcelray; None if nothing is known.
    """
    if not package_is_sent:
        return Needs(SpecifierSet(), [Requirement(f"parcelray=={parcelray.__version__}")])
    path = root / "pyproject.toml"
    if not path.is_file():
        return None
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    return Needs(
        SpecifierSet(project.get("requires-python", "")),
        [Requirement(each) for each in project.get("dependencies", ())],
    )


def query_versions(client: JobSubmissionClient) -> Versions:
    """Queries the versions of a cluster by a short job, which is deleted afterwards.

    Raises:
        SystemFailure: the cluster does not run the job.
    """
    name = f"{PROBE}{uuid.uuid4().hex[:12]}"
    start_job(client, {"entrypoint": shlex.join(["python", "-c", _PROBE]), "submission_id": name})
    deadline = time.monotonic() + PROBE_LIMIT_S
    while not client.get_job_status(name).is_terminal():
        if time.monotonic() > deadline:
            raise SystemFailure(
                f"The cluster has not started a job within {PROBE_LIMIT_S:.0f} s; check with `parcelray jobs list` and"
                " in the dashboard whether its head node is overloaded."
            )
        time.sleep(_POLL_S)
    output = client.get_job_logs(name)
    client.delete_job(name)
    line = next((line for line in output.splitlines() if line.startswith(_MARK)), None)
    if line is None:
        last = (output.strip().splitlines() or ["no output"])[-1]
        raise SystemFailure(f"The cluster cannot run `python`: {last}")
    found = json.loads(line.removeprefix(_MARK))
    return Versions(found["python"], {canonicalize_name(each): found["libraries"][each] for each in found["libraries"]})


def check_versions(needs: Needs, found: Versions, url: str) -> None:
    """Refuses a cluster whose versions a job's code does not accept.

    Raises:
        UserError: names every version that is not accepted, with what is needed and what this machine has.
    """
    differences = []
    if not needs.python.contains(found.python, prereleases=True):
        differences.append(f"Python {found.python} (needed: {needs.python})")
    for each in needs.libraries:
        if each.marker is not None and not each.marker.evaluate():
            continue
        version = found.libraries.get(canonicalize_name(each.name))
        if version is None or not each.specifier.contains(version, prereleases=True):
            differences.append(
                f"{each.name} {version or 'missing'} (needed: {each.specifier or 'any version'}{_here(each.name)})"
            )
    if differences:
        raise UserError(
            f"The cluster {url} cannot run this job: it has {', '.join(differences)}. Install the versions of"
            " requirements.lock on its nodes, or change the project to accept those of the cluster."
        )


def _here(name: str) -> str:
    try:
        return f"; here: {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return ""
