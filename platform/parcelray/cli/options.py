"""What the commands share: their options, and how they read jobs and print results."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parcelray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from parcelray.bench.measure import Report
    from parcelray.config.identity import Job

JobFile = Annotated[Path, typer.Argument(help="A job file, such as jobs/train/nlvr_parcel.yaml.", show_default=False)]
Set = Annotated[
    list[str], typer.Option("--set", help="Change a value of the job: a.b=value. Repeatable.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the resolved plan and its estimates, and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else a local instance.", show_default=False)
]
JobsAddress = Annotated[
    str | None, typer.Option(help="URL of the cluster's dashboard, such as http://127.0.0.1:8265.", show_default=False)
]
SubmissionId = Annotated[
    str, typer.Argument(help="The job's id, as `parcelray jobs list` shows it.", show_default=False)
]


def load(job_file: Path, overrides: list[str]) -> "Job":
    from parcelray.config.loader import load_job

    return load_job(job_file, overrides)


def integers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is {text!r}; give whole numbers separated by commas, such as 16,64,256.") from None


def show(value: Any, as_json: bool, render: Callable[[Any], Any]) -> None:
    if as_json:
        write_json(value.to_dict())
    else:
        console().print(render(value))


def show_report(report: "Report", as_json: bool) -> None:
    show(report, as_json, lambda value: value.to_rich())


def tell(line: str) -> None:
    """Says beside the result what a long command is at."""
    typer.echo(line, err=True)


def write_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def console(*, stderr: bool = False) -> "Console":
    from parcelray.console import open_console

    return open_console(stderr=stderr)
