"""The command line: one thin function per command. Heavy imports wait until a command runs, so `--help` is quick."""

import sys
from typing import Annotated

import typer

from parcelray import __version__
from parcelray.cli.analysis import analyze_app
from parcelray.cli.benches import bench_app
from parcelray.cli.configs import config_app
from parcelray.cli.evaluation import benchmarks_app, evaluate_app
from parcelray.cli.jobs import jobs_app, submit
from parcelray.cli.models import models_app
from parcelray.cli.options import Address, AsJson, DryRun, JobFile, Set, console, integers, show, write_json
from parcelray.cli.serving import keys_app, serve
from parcelray.cli.tuning import tune
from parcelray.errors import ParcelrayError, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One vision-language model, any visual-token budget: on Ray.",
)
app.add_typer(config_app, name="config")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(benchmarks_app, name="benchmarks")
app.add_typer(jobs_app, name="jobs")
app.add_typer(bench_app, name="bench")
app.add_typer(analyze_app, name="analyze")
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.command()(tune)
app.command()(submit)
app.command()(serve)


@app.callback(invoke_without_command=True)
def _version(show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if show:
        console().print(f"parcelray {__version__}")
        raise typer.Exit


@app.command()
def train(
    job_file: JobFile, overrides: Set = [], dry_run: DryRun = False, address: Address = None, as_json: AsJson = False
) -> None:
    """Train the model of a job file; the same command goes on with an interrupted run."""
    from parcelray.config.loader import load_job_of
    from parcelray.config.train import TrainJob

    job = load_job_of(TrainJob, job_file, overrides)
    if dry_run:
        from parcelray.training.plan import training_plan

        show(training_plan(job), as_json, lambda plan: plan.to_rich())
        return
    from parcelray.training.run import run_training

    run = run_training(job, console(stderr=as_json), address=address)
    if as_json:
        write_json(
            {
                "identity": run.identity,
                "model": str(run.model_folder),
                "metrics": run.metrics,
                "mlflow_run_id": run.mlflow_run_id,
                "was_done": run.was_done,
            }
        )


@app.command()
def flops(
    backbone: Annotated[
        str, typer.Option(help="paligemma2-3b, llava-1.5-7b, mini, or a folder with a config.json.")
    ] = "paligemma2-3b",
    resolution: Annotated[
        int | None, typer.Option(help="Image side in pixels; default: the backbone's own.", show_default=False)
    ] = None,
    budgets: Annotated[str, typer.Option(help="Visual tokens per image, separated by commas.")] = "16,64,256",
    frames: Annotated[str, typer.Option(help="Frames (1: an image), separated by commas.")] = "1",
    connector: Annotated[str, typer.Option(help="parcel, mqt, m3, identity or an ablation.")] = "parcel",
    text_tokens: Annotated[
        int | None, typer.Option(help="Text tokens; default: the paper's.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute cost: FLOPs of every term, KV-cache bytes, and the saving against no compression."""
    from parcelray.profiling.cost_table import build

    table = build(
        backbone,
        resolution=resolution,
        budgets=integers(budgets, "--budgets"),
        frames=integers(frames, "--frames"),
        connector=connector,
        text_tokens=text_tokens,
    )
    show(table, as_json, lambda value: value.to_rich())


def main() -> None:
    """Runs the command line; a user's mistake is one message and exit code 2, a failure of the system exit code 1."""
    try:
        app()
    except UserError as error:
        console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
    except ParcelrayError as error:
        console(stderr=True).print(f"failed: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
