"""`parcelray submit` and `parcelray jobs`: submit job files to a Ray cluster and manage them there."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parcelray.cli.options import (
    AsJson,
    DryRun,
    JobFile,
    JobsAddress,
    Set,
    SubmissionId,
    console,
    load,
    show,
    write_json,
)

if TYPE_CHECKING:
    from parcelray.config.identity import Job

jobs_app = typer.Typer(no_args_is_help=True, help="List, follow and stop jobs on a Ray cluster.")


def submit(
    job_file: JobFile,
    overrides: Set = [],
    address: JobsAddress = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Print the logs until the job ends, and exit with its exit code.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Run the job again although it has finished.")] = False,
    dry_run: DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print the plan as JSON.")] = False,
) -> None:
    """Submit a job file to a Ray cluster. Submitting the same job twice runs it once."""
    from parcelray.cluster import jobs
    from parcelray.config.identity import identity

    job = load(job_file, overrides)
    _warn_of_lost_paths(job)
    if dry_run:
        show(
            jobs.plan_submission(job_file, identity=identity(job), address=address, overrides=overrides),
            as_json,
            lambda plan: plan.to_rich(),
        )
        return
    sent = jobs.submit(job_file, identity=identity(job), address=address, overrides=overrides, again=again)
    console().print(sent.message, soft_wrap=True)
    if wait:
        raise typer.Exit(jobs.wait(sent.submission_id, address=address, write=sys.stdout.write).exit_code)


@jobs_app.command("list")
def jobs_list(address: JobsAddress = None, as_json: AsJson = False) -> None:
    """List the jobs of the cluster, newest first."""
    from parcelray.cluster import jobs

    _print_states(jobs.list_jobs(address=address), as_json)


@jobs_app.command("status")
def jobs_status(submission_id: SubmissionId, address: JobsAddress = None, as_json: AsJson = False) -> None:
    """Show the status of one job."""
    from parcelray.cluster import jobs

    _print_states([jobs.status(submission_id, address=address)], as_json)


@jobs_app.command("logs")
def jobs_logs(
    submission_id: SubmissionId,
    address: JobsAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue to print until the job ends.")] = False,
) -> None:
    """Print the logs of one job."""
    from parcelray.cluster import jobs

    for piece in jobs.logs(submission_id, address=address, follow=follow):
        sys.stdout.write(piece)


@jobs_app.command("stop")
def jobs_stop(submission_id: SubmissionId, address: JobsAddress = None) -> None:
    """Stop one job."""
    from parcelray.cluster import jobs

    _print_states([jobs.stop(submission_id, address=address)], as_json=False)


def _warn_of_lost_paths(job: "Job") -> None:
    # Serve jobs have no `storage`.
    paths = {"storage": getattr(job, "storage", None), "tracking.uri": job.tracking.uri}
    local = [name for name, value in paths.items() if value and "://" not in value.replace("sqlite:///", "")]
    if local:
        console(stderr=True).print(
            f"warning: {' and '.join(local)} are local paths. On the cluster they are inside the job's copy of the"
            " project, which is deleted with the job. Set them to storage and a tracking server that all nodes reach.",
            style="yellow",
            soft_wrap=True,
        )


def _print_states(states: list[Any], as_json: bool) -> None:
    if as_json:
        write_json(
            [
                {
                    "submission_id": state.submission_id,
                    "status": state.status,
                    "message": state.message,
                    "entrypoint": state.entrypoint,
                }
                for state in states
            ]
        )
        return
    from rich.table import Table

    table = Table("job", "status", "started", "message")
    for state in states:
        table.add_row(
            state.submission_id,
            state.status,
            f"{state.started:%Y-%m-%d %H:%M:%S}" if state.started else "",
            state.message or "",
        )
    console().print(table)
