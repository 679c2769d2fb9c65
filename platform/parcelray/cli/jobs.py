"""`parcelray submit` and `parcelray jobs`: submit jobs to a Ray cluster and manage them there."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parcelray.cli.options import (
    AsJson,
    DryRun,
    JobsAddress,
    Set,
    SubmissionId,
    console,
    load,
    path,
    show,
    write_json,
)
from parcelray.errors import UserError

if TYPE_CHECKING:
    from parcelray.cluster.jobs import JobState
    from parcelray.cluster.submission import JobRequest
    from parcelray.config.identity import Job

jobs_app = typer.Typer(no_args_is_help=True, help="List, follow and stop jobs on a Ray cluster.")
_CONFIRM = "--confirm"
_FINE = ("RUNNING", "SUCCEEDED")
"""Statuses whose message has no news."""


def submit(  # noqa: PLR0913 - options of a command
    file: Annotated[
        Path,
        typer.Argument(
            help="Path of a job file (YAML), or of a script of pipelines/ (Python).", show_default=False, parser=path
        ),
    ],
    overrides: Set = [],
    address: JobsAddress = None,
    env: Annotated[
        list[str],
        typer.Option(
            help="Environment variable of the job, NAME=VALUE; everyone who lists jobs can read it; default: none."
            " Repeatable.",
            show_default=False,
        ),
    ] = [],
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Print the logs until the job ends, and exit with its exit code. Ctrl-C leaves the job running.",
        ),
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Run the job again although it has finished.")] = False,
    confirm: Annotated[
        bool, typer.Option(_CONFIRM, help="Pass --confirm to a search, see `parcelray tune --help`.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job file or a pipeline to a Ray cluster. Submitting the same job twice runs it once."""
    request = _request(file, overrides, confirm)
    variables = _variables(env)
    lost = _lost_paths(request)
    if lost is not None:
        if not dry_run and file.suffix != ".py":
            raise UserError(lost)
        console(stderr=True).print(f"warning: {lost}", style="yellow", markup=False, soft_wrap=True)
    from parcelray.cluster import jobs, submission

    if dry_run:
        show(submission.plan_submission(request, address=address), as_json, lambda plan: plan.to_rich())
        return
    sent = submission.submit(request, address=address, env_vars=variables, again=again)
    if not as_json or wait:
        console(stderr=as_json).print(sent.message, markup=False, soft_wrap=True)
    if not wait:
        if as_json:
            write_json(sent.to_dict())
        return
    # `echo` flushes, so that a log file or a pipe has each line at once.
    write = functools.partial(typer.echo, nl=False, err=as_json)
    with _leaving_it_running(sent.submission_id):
        state = jobs.wait(sent.submission_id, address=address, write=write)
    if as_json:
        write_json(sent.to_dict() | state.to_dict())
    elif state.exit_code:
        console(stderr=True).print(
            f"{state.submission_id} {state.status}: {state.message} `parcelray jobs show {state.submission_id}` prints"
            " the details.",
            markup=False,
            soft_wrap=True,
        )
    raise typer.Exit(state.exit_code)


@jobs_app.command("list")
def jobs_list(address: JobsAddress = None, as_json: AsJson = False) -> None:
    """List the jobs of the cluster, newest first."""
    from parcelray.cluster import jobs

    _print_states(jobs.list_jobs(address=address), as_json)


@jobs_app.command("status")
def jobs_status(submission_id: SubmissionId, address: JobsAddress = None, as_json: AsJson = False) -> None:
    """Print the status of one job."""
    from parcelray.cluster import jobs

    _print_states([jobs.status(submission_id, address=address)], as_json)


@jobs_app.command("show")
def jobs_show(submission_id: SubmissionId, address: JobsAddress = None, as_json: AsJson = False) -> None:
    """Show one job with its runs, checkpoints, model versions and endpoint, and why its workers failed."""
    from parcelray.cli.job_report import build_report

    show(build_report(submission_id, address=address), as_json, lambda report: report.to_rich())


@jobs_app.command("logs")
def jobs_logs(
    submission_id: SubmissionId,
    address: JobsAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue to print until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the logs of one job."""
    from parcelray.cluster import jobs

    with _leaving_it_running(submission_id):
        lines = jobs.logs(submission_id, address=address, follow=follow)
        if as_json:
            write_json({"submission_id": submission_id, "logs": "".join(lines)})
            return
        for line in lines:
            typer.echo(line, nl=False)


@jobs_app.command("stop")
def jobs_stop(submission_id: SubmissionId, address: JobsAddress = None, as_json: AsJson = False) -> None:
    """Stop one job."""
    from parcelray.cluster import jobs

    _print_states([jobs.stop(submission_id, address=address)], as_json)


@contextmanager
def _leaving_it_running(submission_id: str) -> Iterator[None]:
    """On Ctrl-C, says that the job continues, and exits with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        console(stderr=True).print(
            f"\nThe job {submission_id} continues on the cluster. Follow it with `parcelray jobs logs --follow"
            f" {submission_id}`, or stop it with `parcelray jobs stop {submission_id}`.",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None


def _request(file: Path, overrides: Sequence[str], confirm: bool) -> "JobRequest":
    """Reads what is to be submitted.

    Raises:
        UserError: the file cannot be used, or `--confirm` is given for another kind of job than a search.
    """
    from parcelray.cluster.submission import PIPELINE, JobRequest

    flags = [_CONFIRM] if confirm else []
    if file.suffix != ".py":
        from parcelray.config.identity import identity
        from parcelray.config.paths import AS_WRITTEN

        job = load(file, list(overrides))
        if confirm and job.kind != "tune":
            raise UserError(f"{file}: kind is {job.kind}, but --confirm belongs to a search (kind tune); leave it out.")
        settings = job.model_dump(mode="json", context=AS_WRITTEN)
        return JobRequest(file, identity(job), overrides, flags, settings, _keys_file(job))
    from parcelray.config.loader import apply_override

    settings = {}
    for override in overrides:
        apply_override(settings, override)
    try:
        content = "\n".join([file.read_text(encoding="utf-8"), *overrides, *flags])
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give the path of a job file or script.") from None
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return JobRequest(file, f"{PIPELINE}-{file.stem}-{digest}", overrides, flags, settings)


def _keys_file(job: "Job") -> list[Path]:
    """The file of the API keys of an endpoint; an absolute path is one of the cluster's head.

    Raises:
        UserError: the file cannot be read.
    """
    from parcelray.config.paths import written
    from parcelray.config.serve import ServeJob
    from parcelray.serving.http.auth import read_keys

    keys = job.http.keys_file if isinstance(job, ServeJob) else None
    if keys is None or Path(written(keys)).is_absolute():
        return []
    read_keys(Path(keys))
    return [Path(keys)]


def _variables(env: Sequence[str]) -> dict[str, str]:
    variables = dict(text.partition("=")[::2] for text in env)
    for text in env:
        if not text.partition("=")[0].isidentifier() or "=" not in text:
            raise UserError(f"--env is {text.partition('=')[0]!r}; give NAME=VALUE, such as OMP_NUM_THREADS=4.")
    return variables


def _lost_paths(request: "JobRequest") -> str | None:
    """A sentence if results of the job would be lost, because their paths are relative; None if they are kept."""
    from parcelray.config.paths import SQLITE_PREFIX

    paths = {"storage": request.storage, "tracking.uri": request.tracking_uri}
    relative = {
        name: value
        for name, value in paths.items()
        if value
        and "://" not in value.removeprefix(SQLITE_PREFIX)
        and not value.removeprefix(SQLITE_PREFIX).startswith(("/", "~"))
    }
    if not relative:
        return None
    named = " and ".join(f"{name} ({value})" for name, value in relative.items())
    return (
        f"{named}: relative paths are inside the job's copy of the project on the cluster, which is deleted with the"
        " job. Set them to storage and an MLflow server that all nodes reach: --set storage=s3://BUCKET/runs --set"
        " tracking.uri=http://HOST:5000."
    )


def _print_states(states: "Sequence[JobState]", as_json: bool) -> None:
    if as_json:
        write_json([state.to_dict() for state in states])
        return
    console().print(states_table(states))


def states_table(states: "Sequence[JobState]") -> Any:
    """Returns jobs as a table that is readable at 100 columns: long ids are folded, long messages are cut."""
    import textwrap

    from rich.table import Table

    from parcelray.cli.job_report import duration

    table = Table()
    table.add_column("job", overflow="fold", min_width=32)
    table.add_column("status", no_wrap=True)
    table.add_column("started (UTC)", no_wrap=True)
    table.add_column("duration", no_wrap=True, justify="right")
    table.add_column("message")
    for state in states:
        table.add_row(
            state.submission_id,
            state.status,
            f"{state.started:%m-%d %H:%M}" if state.started else "",
            duration(state),
            textwrap.shorten(state.message, 80, placeholder=" ...") if state.status not in _FINE else "",
        )
    return table
