"""`parcelray doctor`: checks this machine and what a job uses."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from parcelray.cli.options import AsJson, JobsAddress, Set, console, load, path, write_json

_STYLES = {"pass": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


def doctor(
    job_file: Annotated[
        Path | None,
        typer.Argument(
            help="Job file whose store, storage, models and GPUs are checked; default: the default settings of jobs.",
            show_default=False,
            parser=path,
        ),
    ] = None,
    overrides: Set = [],
    address: JobsAddress = None,
    security: Annotated[
        bool,
        typer.Option(
            "--security", help="Also check listening addresses, file modes, API keys, and secrets in job files."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine, the stores and the cluster; exit code 1 if a check fails."""
    from parcelray.doctor.run import examine, target_of

    target = target_of(load(job_file, overrides) if job_file is not None else None)
    findings = []
    for finding in examine(target, address=address, security=security, folder=Path(), job_file=job_file):
        findings.append(finding)
        if not as_json:
            style = _STYLES[finding.status]
            console().print(f"{finding.status}  {finding.check:<21}  {finding.detail}", style=style, markup=False)
            if finding.remedy:
                console().print(f"      remedy: {finding.remedy}", markup=False, soft_wrap=True)
    failed = [finding.check for finding in findings if finding.status == "fail"]
    if as_json:
        write_json({"passed": not failed, "checks": [asdict(finding) for finding in findings]})
    else:
        console().print(f"failed: {', '.join(failed)}" if failed else "Everything that is configured works.")
    if failed:
        raise typer.Exit(1)
