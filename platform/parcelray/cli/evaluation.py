"""`parcelray evaluate` and `parcelray benchmarks`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from parcelray.cli.options import Address, AsJson, DryRun, JobFile, Set, console, show, write_json
from parcelray.errors import UserError


class _DefaultToRun(TyperGroup):
    """A group whose first word may be a job file: then it runs it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Puts `run` before a word that is no command."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


evaluate_app = typer.Typer(
    no_args_is_help=True,
    cls=_DefaultToRun,
    help="Evaluate a checkpoint at every budget: `parcelray evaluate jobs/evaluate/mini.yaml`.",
)
benchmarks_app = typer.Typer(no_args_is_help=True, help="The benchmarks, and whether your data fit them.")
Own = Annotated[
    list[Path], typer.Option("--catalog", help="YAML file or folder with your own. Repeatable.", show_default=False)
]


@evaluate_app.command("run")
def evaluate_run(
    job_file: JobFile, overrides: Set = [], dry_run: DryRun = False, address: Address = None, as_json: AsJson = False
) -> None:
    """Evaluate the checkpoint of a job file; the same command goes on with an interrupted run, and computes only what is missing."""
    from parcelray.config.evaluate import EvaluateJob
    from parcelray.config.loader import load_job_of

    job = load_job_of(EvaluateJob, job_file, overrides)
    if dry_run:
        from parcelray.evaluation.plan import evaluation_plan

        show(evaluation_plan(job), as_json, lambda plan: plan.to_rich())
        return
    from parcelray.evaluation.run import run_evaluation

    run = run_evaluation(job, console(stderr=as_json), address=address)
    if as_json:
        write_json(
            run.summary.to_dict()
            | {
                "computed": run.computed,
                "present": run.present,
                "folder": str(run.folder),
                "mlflow_run_id": run.mlflow_run_id,
            }
        )


@evaluate_app.command("score")
def evaluate_score(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a finished evaluation, such as runs/evaluate/mini.", show_default=False)
    ],
    metrics: Annotated[
        list[str],
        typer.Option("--metric", help="BENCHMARK=METRIC:VARIANT instead of its own. Repeatable.", show_default=False),
    ] = [],
    need_within: Annotated[
        float, typer.Option(help="Percent of the full score that the needed budget may lose.")
    ] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Score a finished evaluation again, without the model and the data."""
    from parcelray.evaluation.results import show
    from parcelray.evaluation.scoring.summary import rescore

    chosen = dict(pair(text, "--metric", "BENCHMARK=METRIC:VARIANT") for text in metrics)
    summary = rescore(folder, chosen, need_within)
    write_json(summary.to_dict()) if as_json else show(summary, console())


@evaluate_app.command("compare")
def evaluate_compare(
    first: Annotated[
        str,
        typer.Argument(
            help="Folder of an evaluation, with @BUDGET for one budget: runs/evaluate/mini@64.", show_default=False
        ),
    ],
    second: Annotated[str, typer.Argument(help="Another, or the same at another budget.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare two evaluations, or two budgets of one, on the same samples: paired bootstrap and McNemar's test."""
    from parcelray.evaluation.compare import compare_evaluations

    show(compare_evaluations(first, second), as_json, lambda value: value.to_rich())


@evaluate_app.command("aggregate")
def evaluate_aggregate(
    table: Annotated[
        Path,
        typer.Argument(
            help="CSV with a row per benchmark: benchmark, family, reference, and a column per method.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """The aggregate rows of a printed table: mean retention by family and overall, and the splits that lose most."""
    from parcelray.evaluation.scoring.printed_table import aggregate_table

    show(aggregate_table(table), as_json, lambda value: value.to_rich())


@evaluate_app.command("seeds")
def evaluate_seeds(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of the same evaluation of models trained with different seeds.", show_default=False
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Mean and standard deviation over seeds."""
    from parcelray.evaluation.compare import compare_seeds

    show(compare_seeds(folders), as_json, lambda value: value.to_rich())


@benchmarks_app.command("list")
def benchmarks_list(
    only: Annotated[
        str | None, typer.Option("--set", help="Only of a set: parcel, paligemma, llava or local.", show_default=False)
    ] = None,
    own: Own = [],
    as_json: AsJson = False,
) -> None:
    """List the benchmark splits."""
    from parcelray.benchmarks.listing import Listing

    show(Listing.of(own, only), as_json, lambda value: value.to_rich())


@benchmarks_app.command("show")
def benchmarks_show(
    name: Annotated[str, typer.Argument(help="As `list` shows it.", show_default=False)],
    own: Own = [],
    as_json: AsJson = False,
) -> None:
    """Everything that is known of one split, as the YAML that describes it."""
    import yaml

    from parcelray.benchmarks.catalog import catalog, find

    data = find(name, catalog(own)).model_dump(mode="json", exclude_defaults=True)
    (
        write_json(data)
        if as_json
        else sys.stdout.write(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=140))
    )


@benchmarks_app.command("check")
def benchmarks_check(
    name: Annotated[str, typer.Argument(help="As `list` shows it.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(help="File or folder of its data; default: the Hugging Face hub.", show_default=False)
    ] = None,
    own: Own = [],
    rows: Annotated[int, typer.Option(min=1, help="Rows to read and decode.")] = 1000,
    family: Annotated[str, typer.Option(help="In whose words: paligemma or llava.")] = "paligemma",
    as_json: AsJson = False,
) -> None:
    """Check that data fit a benchmark: columns, ids, images, answers, and the number of rows.

    Exit code 2 if something is wrong.
    """
    from parcelray.benchmarks.listing import check_data

    report = check_data(name, data, own, rows, family)
    show(report, as_json, lambda value: value.to_rich())
    if report.problems:
        raise typer.Exit(2)


def pair(text: str, option: str, form: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not (separator and key and value):
        raise UserError(f"{option} is {text!r}; write {form}.")
    return key, value
