"""`parcelray models`: registered models and the promotion gates of the `champion` alias."""

from typing import Annotated

import typer

from parcelray.cli.options import Address, AsJson, DryRun, JobFile, Set, console, show, write_json

models_app = typer.Typer(no_args_is_help=True, help="List, promote and roll back registered models.")

_Name = Annotated[str, typer.Argument(help="Name of a registered model.", show_default=False)]
_TrackingUri = Annotated[
    str | None,
    typer.Option(help="MLflow tracking URI of the registry; default: sqlite:///runs/mlflow.db.", show_default=False),
]


@models_app.command("list")
def models_list(tracking_uri: _TrackingUri = None, as_json: AsJson = False) -> None:
    """List the registered models with their aliases."""
    from parcelray.promotion.registered_models import list_models

    show(list_models(tracking_uri), as_json, lambda value: value.to_rich())


@models_app.command("show")
def models_show(
    name: _Name,
    version: Annotated[
        str | None, typer.Argument(help="Version number or alias; default: all versions.", show_default=False)
    ] = None,
    tracking_uri: _TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Show the versions of a model, or one version with its origin, scores and gate results."""
    from parcelray.promotion.registered_models import show_model

    show(show_model(name, version, tracking_uri), as_json, lambda value: value.to_rich())


@models_app.command("promote")
def models_promote(
    job_file: JobFile,
    overrides: Set = [],
    force: Annotated[
        bool, typer.Option("--force", help="Promote even if gates fail; the version records that it was forced.")
    ] = False,
    dry_run: DryRun = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a candidate against the promotion gates and, on success, move the `champion` alias to it.

    Exit code 2 if a gate fails.
    """
    from parcelray.config.loader import load_job_of
    from parcelray.config.promote import PromoteJob
    from parcelray.promotion.run import promotion_plan, run_promotion

    job = load_job_of(PromoteJob, job_file, overrides)
    if dry_run:
        show(promotion_plan(job), as_json, lambda plan: plan.to_rich())
        return
    verdict = run_promotion(job, console(stderr=as_json), force=force, address=address)
    if as_json:
        write_json(verdict.to_dict())


@models_app.command("rollback")
def models_rollback(name: _Name, tracking_uri: _TrackingUri = None, as_json: AsJson = False) -> None:
    """Swap the aliases `champion` and `previous` of a model."""
    from parcelray.promotion.registered_models import roll_back

    show(roll_back(name, tracking_uri), as_json, lambda value: value.to_rich())
