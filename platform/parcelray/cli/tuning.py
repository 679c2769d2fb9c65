"""`parcelray tune`: searches over a search space, and selects from finished searches."""

from pathlib import Path
from typing import Annotated

import typer

from parcelray.cli.options import Address, AsJson, DryRun, JobFile, Set, console, path, show, write_json


def tune(  # noqa: PLR0913 - options of a command
    job_file: JobFile,
    overrides: Set = [],
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume a search; finished trials are not run again.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: run failed trials again.")
    ] = False,
    select: Annotated[
        str | None,
        typer.Option(
            help=(
                "Rule that selects a finished trial and writes its job file, for example 'max retention subject to"
                " tokens <= 64'; for an evaluation with a reducer, a job that serves it; default: run the search."
            ),
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="With --select: file to write; default: selected.yaml in the folder of the search, or in the working"
            " folder if the search is on object storage.",
            show_default=False,
            parser=path,
        ),
    ] = None,
    confirm: Annotated[
        bool,
        typer.Option(
            "--confirm", help="After a split search: train the splits that `confirm` in the job file selects."
        ),
    ] = False,
    dry_run: DryRun = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Search over keys of a job: anchor/query splits, cluster counts, or any other key."""
    from parcelray.config.loader import load_job_of
    from parcelray.config.tune import TuneJob

    job = load_job_of(TuneJob, job_file, overrides)
    if dry_run:
        from parcelray.tuning.plan import tuning_plan

        show(tuning_plan(job, address), as_json, lambda plan: plan.to_rich())
        return
    if select is not None:
        from parcelray.tracking.run_folder import RunFolder
        from parcelray.tuning.results import select as select_trial
        from parcelray.tuning.trial_record import TrialRecord

        run_folder = RunFolder(job)
        # The trials there may be those of another search under the same name.
        run_folder.check()
        # A job file is for this host, also if the search is on object storage.
        path = output or (Path(run_folder.path) if run_folder.is_local else Path()) / "selected.yaml"
        chosen = select_trial(job, TrialRecord(run_folder.uri).trials, select, path)
        if as_json:
            files = {"file": str(path), "kind": chosen.kind}
            if chosen.evaluation is not None:
                files["evaluation"] = str(chosen.evaluation)
            write_json(files | {"assignment": chosen.trial.assignment, "metrics": dict(chosen.trial.metrics)})
            return
        console().print(
            f"{path}: trial {chosen.trial.key}. Run it with: parcelray {chosen.kind} {path}", soft_wrap=True
        )
        if chosen.evaluation is not None:
            console().print(
                f"{chosen.evaluation}: its evaluation. Run it with: parcelray evaluate {chosen.evaluation}",
                soft_wrap=True,
            )
        return
    from parcelray.tuning.run import run_tuning

    run = run_tuning(job, console(stderr=as_json), address=address, resume=resume, retry_failed=retry_failed)
    confirmed = None
    if confirm:
        from parcelray.tuning.confirm import confirm_splits

        confirmed = confirm_splits(job, run, console(stderr=as_json), address=address)
    if as_json:
        extra = {"confirmation": confirmed.to_dict()} if confirmed is not None else {}
        write_json(
            run.findings.to_dict()
            | {"identity": run.identity, "folder": run.run_folder.uri, "mlflow_run_id": run.mlflow_run_id}
            | extra
        )
