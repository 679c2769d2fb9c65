"""Options that several commands share, and helpers that read job files and print results."""

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parcelray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from parcelray.bench.measure import Report
    from parcelray.config.evaluate import EvaluateJob
    from parcelray.config.identity import Job


def path(text: str | Path) -> Path:
    """Parses every argument and option that is a path; shells do not expand the `~` of `--output=~/folder`."""
    return Path(text).expanduser()


JobFile = Annotated[
    Path,
    typer.Argument(
        help="Path of a job file (YAML); examples are in the folder jobs/.", show_default=False, parser=path
    ),
]
Set = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="Override one key of the job file: a.b=value; default: no override. Repeatable.",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan with its estimates and exit.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Address of the Ray cluster, HOST:PORT; default: RAY_ADDRESS, otherwise a local Ray is started.",
        show_default=False,
    ),
]
JobsAddress = Annotated[
    str | None,
    typer.Option(
        help="URL of the Ray dashboard, http://HOST:8265; default: RAY_API_SERVER_ADDRESS, otherwise RAY_ADDRESS.",
        show_default=False,
    ),
]
SubmissionId = Annotated[
    str, typer.Argument(help="Id of the job, as printed by `parcelray jobs list`.", show_default=False)
]


def load(job_file: Path, overrides: list[str]) -> "Job":
    from parcelray.config.loader import load_job

    return load_job(job_file, overrides)


def load_evaluation(job_file: Path, overrides: list[str], as_json: bool) -> "EvaluateJob":
    """Read an evaluate job; if a registered version has a reducer that applies, print a sentence about it."""
    from parcelray.config.evaluate import EvaluateJob
    from parcelray.config.loader import load_job_of
    from parcelray.evaluation.plan import as_promoted

    job, note = as_promoted(load_job_of(EvaluateJob, job_file, overrides))
    if note is not None:
        console(stderr=as_json).print(note, markup=False, soft_wrap=True)
    return job


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


def print_progress(line: str) -> None:
    """Prints a progress line of a long command to stderr, separate from the result."""
    typer.echo(line, err=True)


def write_json(data: Any) -> None:
    """Prints JSON; numbers that JSON does not have (NaN, infinity) are null."""
    sys.stdout.write(json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def console(*, stderr: bool = False) -> "Console":
    from parcelray.console import open_console

    return open_console(stderr=stderr)
