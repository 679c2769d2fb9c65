"""The command line: one thin function per command.

Heavy libraries are imported inside the commands, so that `--help` answers quickly.
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from parcelray import __version__
from parcelray.cli.analysis import analyze_app
from parcelray.cli.benches import bench_app
from parcelray.cli.configs import config_app
from parcelray.cli.doctor import doctor
from parcelray.cli.evaluation import benchmarks_app, evaluate_app
from parcelray.cli.jobs import jobs_app, submit
from parcelray.cli.models import models_app
from parcelray.cli.options import Address, AsJson, DryRun, JobFile, Set, console, integers, show, write_json
from parcelray.cli.plan import plan
from parcelray.cli.runs import runs_app
from parcelray.cli.serving import endpoint_app, keys_app, serve
from parcelray.cli.tuning import tune
from parcelray.errors import ParcelrayError, UserError

_PANELS = {
    "Run": ("train", "tune", "evaluate", "serve"),
    "Cluster": ("submit", "jobs", "endpoint"),
    "Inspect": ("plan", "runs", "models", "benchmarks", "flops", "analyze", "bench"),
    "Set up": ("doctor", "config", "keys"),
}
"""Panel of `parcelray --help` -> its commands, both in the order of work."""
_PANEL_OF = {command: panel for panel, commands in _PANELS.items() for command in commands}


class _OrderOfWork(TyperGroup):
    """Lists the commands in the order of `_PANELS`; typer alone would list all groups before all single commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the names of the commands in the order of `_PANELS`."""
        return list(_PANEL_OF)


app = typer.Typer(
    cls=_OrderOfWork,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, search, evaluate and serve vision-language models at any visual-token budget, on Ray.",
)
for _name, _group in {
    "evaluate": evaluate_app,
    "jobs": jobs_app,
    "runs": runs_app,
    "models": models_app,
    "benchmarks": benchmarks_app,
    "analyze": analyze_app,
    "bench": bench_app,
    "config": config_app,
    "endpoint": endpoint_app,
    "keys": keys_app,
}.items():
    app.add_typer(_group, name=_name, rich_help_panel=_PANEL_OF[_name])
for _command in (tune, serve, submit, plan, doctor):
    app.command(rich_help_panel=_PANEL_OF[_command.__name__])(_command)


@app.callback(invoke_without_command=True)
def _version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if show:
        console().print(f"parcelray {__version__}")
        raise typer.Exit


@app.command(rich_help_panel=_PANEL_OF["train"])
def train(
    job_file: JobFile,
    overrides: Set = [],
    dry_run: DryRun = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: type of GPU that time and GPU hours are for, such as h100; default: this machine.",
            show_default=False,
        ),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Train a model; run the same command again to resume an interrupted training."""
    from parcelray.config.loader import load_job_of
    from parcelray.config.train import TrainJob

    job = load_job_of(TrainJob, job_file, overrides)
    if dry_run:
        from parcelray.training.plan import training_plan

        show(training_plan(job, gpu=gpu, with_peak=True), as_json, lambda plan: plan.to_rich())
        return
    from parcelray.training.run import run_training

    try:
        run = run_training(job, console(stderr=as_json), address=address)
    except KeyboardInterrupt:
        message = "Stopped. The steps up to the newest checkpoint are kept; run the same command again to resume."
        console(stderr=True).print(message, markup=False, soft_wrap=True)
        raise
    if as_json:
        write_json(
            {
                "identity": run.identity,
                "model": run.model,
                "metrics": run.metrics,
                "mlflow_run_id": run.mlflow_run_id,
                "was_done": run.was_done,
                "registered": run.registered,
            }
        )


@app.command(rich_help_panel=_PANEL_OF["flops"])
def flops(
    backbone: Annotated[
        str, typer.Option(help="Backbone: paligemma2-3b, llava-1.5-7b, mini, or a folder with a config.json.")
    ] = "paligemma2-3b",
    resolution: Annotated[
        int | None, typer.Option(help="Image side in pixels; default: that of the backbone.", show_default=False)
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Budgets (visual tokens per image), separated by commas; default: those of 16,64,256 that the"
            " connector supports, or all its budgets if it supports none of them.",
            show_default=False,
        ),
    ] = None,
    frames: Annotated[
        str, typer.Option(help="Numbers of frames per input (1 is an image), separated by commas.")
    ] = "1",
    connector: Annotated[
        str | None,
        typer.Option(
            help="Connector, such as parcel, mqt, m3 or identity; default: parcel, without --reducer.",
            show_default=False,
        ),
    ] = None,
    reducer: Annotated[
        str | None,
        typer.Option(
            help="Training-free reducer, by name (cluster_aggregate, fastv, ...) or as YAML with settings, such as"
            " '{type: prumerge, spatial: true}'; default: none.",
            show_default=False,
        ),
    ] = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(
            help="Number of text tokens; default: 129 for an image, 65 for a video, as in the PARCEL paper.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute FLOPs by term, KV-cache bytes, and the saving against the uncompressed model."""
    workload: dict[str, Any] = {
        "resolution": resolution,
        "frames": integers(frames, "--frames"),
        "text_tokens": text_tokens,
    }
    given = None if budgets is None else integers(budgets, "--budgets")
    if reducer is not None:
        if connector not in (None, "identity"):
            raise UserError(
                f"--reducer {reducer} reduces the tokens of a model without compression, but --connector is"
                f" {connector}; leave one of the two out."
            )
        from parcelray.profiling.reduction_table import build_reduced

        table_of_reducer = build_reduced(backbone, reducer, budgets=given or (16, 64, 256), **workload)
        show(table_of_reducer, as_json, lambda value: value.to_rich())
        return
    from parcelray.profiling.cost_table import DEFAULT_CONNECTOR, build

    table = build(backbone, connector=connector or DEFAULT_CONNECTOR, budgets=given, **workload)
    show(table, as_json, lambda value: value.to_rich())


def main() -> None:
    """Runs the command line: exit code 2 and one message for a user error, exit code 1 for a system failure.

    A full, read-only or broken disk is a system failure, too.
    """
    from parcelray.loopback import bypass_proxies_on_loopback

    bypass_proxies_on_loopback()
    try:
        app()
    except UserError as error:
        console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
    except ParcelrayError as error:
        console(stderr=True).print(f"failed: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        from parcelray.files import explained_failure

        reason = explained_failure(error)
        if reason is None:
            raise
        console(stderr=True).print(f"failed: {reason}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
