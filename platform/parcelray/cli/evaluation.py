"""`parcelray evaluate` and `parcelray benchmarks`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from parcelray.cli.options import (
    Address,
    AsJson,
    DryRun,
    JobFile,
    Set,
    console,
    load_evaluation,
    path,
    show,
    write_json,
)
from parcelray.errors import UserError


class _DefaultToRun(TyperGroup):
    """A command group whose first argument may be a job file, which it then passes to `run`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Inserts `run` before an argument that is not a command."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


evaluate_app = typer.Typer(
    no_args_is_help=True,
    cls=_DefaultToRun,
    help="Evaluate a checkpoint at several budgets: `parcelray evaluate jobs/evaluate/mini.yaml`.",
)
benchmarks_app = typer.Typer(
    no_args_is_help=True,
    help="List and show the benchmarks, check your data against them, and score answers that were made elsewhere.",
)
BenchmarkData = Annotated[
    Path | None,
    typer.Option(help="File or folder with the data; default: the Hugging Face hub.", show_default=False, parser=path),
]
CatalogFiles = Annotated[
    list[Path],
    typer.Option(
        "--catalog",
        help="YAML file or folder with benchmarks of your own; default: only the built-in ones. Repeatable.",
        show_default=False,
        parser=path,
    ),
]


@evaluate_app.command("run")
def evaluate_run(
    job_file: JobFile, overrides: Set = [], dry_run: DryRun = False, address: Address = None, as_json: AsJson = False
) -> None:
    """Evaluate a checkpoint; run the same command again to compute only the missing predictions."""
    job = load_evaluation(job_file, overrides, as_json)
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
                "folder": run.uri,
                "mlflow_run_id": run.mlflow_run_id,
            }
        )


@evaluate_app.command("score")
def evaluate_score(
    folder: Annotated[
        str,
        typer.Argument(
            help="Folder or URI of a finished evaluation, such as s3://BUCKET/runs/evaluate/mini.",
            show_default=False,
        ),
    ],
    metrics: Annotated[
        list[str],
        typer.Option(
            "--metric",
            help="Metric of a benchmark as BENCHMARK=METRIC:VARIANT; default: that of the evaluation. Repeatable.",
            show_default=False,
        ),
    ] = [],
    need_within: Annotated[
        float,
        typer.Option(
            min=0,
            max=100,
            help="Tolerance in percent; the needed budget is the smallest one with a score this close to the full one.",
        ),
    ] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Compute the scores of a finished evaluation again, without the model and the data."""
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
            help="Folder or URI of an evaluation; append @BUDGET for one budget: runs/evaluate/mini@64.",
            show_default=False,
        ),
    ],
    second: Annotated[
        str, typer.Argument(help="Another evaluation, or the same one at another budget.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Compare two evaluations or two budgets on the same samples: paired differences, intervals and p-values."""
    from parcelray.evaluation.compare import compare_evaluations

    show(compare_evaluations(first, second), as_json, lambda value: value.to_rich())


@evaluate_app.command("aggregate")
def evaluate_aggregate(
    table: Annotated[
        Path,
        typer.Argument(
            help="CSV file, one row per benchmark: columns benchmark, family, reference, and one per method.",
            show_default=False,
            parser=path,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Aggregate a table of scores: mean retention by family and overall, and the splits with the largest loss."""
    from parcelray.evaluation.scoring.printed_table import aggregate_table

    show(aggregate_table(table), as_json, lambda value: value.to_rich())


@evaluate_app.command("seeds")
def evaluate_seeds(
    folders: Annotated[
        list[str],
        typer.Argument(
            help="Folders or URIs of one evaluation for models that were trained with different seeds.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Compute mean and standard deviation over training seeds."""
    from parcelray.evaluation.compare import compare_seeds

    show(compare_seeds(folders), as_json, lambda value: value.to_rich())


@benchmarks_app.command("list")
def benchmarks_list(
    only: Annotated[
        str | None,
        typer.Option(
            "--set", help="List only one set: parcel, paligemma, llava or local; default: all.", show_default=False
        ),
    ] = None,
    own: CatalogFiles = [],
    as_json: AsJson = False,
) -> None:
    """List the benchmark splits."""
    from parcelray.benchmarks.listing import Listing

    show(Listing.of(own, only), as_json, lambda value: value.to_rich())


@benchmarks_app.command("show")
def benchmarks_show(
    name: Annotated[
        str, typer.Argument(help="Benchmark name, as printed by `parcelray benchmarks list`.", show_default=False)
    ],
    own: CatalogFiles = [],
    as_json: AsJson = False,
) -> None:
    """Print the YAML description of one benchmark split."""
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
    name: Annotated[
        str, typer.Argument(help="Benchmark name, as printed by `parcelray benchmarks list`.", show_default=False)
    ],
    data: BenchmarkData = None,
    own: CatalogFiles = [],
    rows: Annotated[int, typer.Option(min=1, help="Number of rows to read and decode.")] = 1000,
    family: Annotated[str, typer.Option(help="Prompt family: paligemma or llava.")] = "paligemma",
    as_json: AsJson = False,
) -> None:
    """Check data against a benchmark: columns, ids, images, answers, what its metric needs, and the number of rows.

    Exit code 2 if a check fails.
    """
    from parcelray.benchmarks.listing import check_data

    report = check_data(name, data, own, rows, family)
    show(report, as_json, lambda value: value.to_rich())
    if report.problems:
        raise typer.Exit(2)


@benchmarks_app.command("score")
def benchmarks_score(
    name: Annotated[
        str, typer.Argument(help="Benchmark name, as printed by `parcelray benchmarks list`.", show_default=False)
    ],
    answers: Annotated[
        Path,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="JSON-lines file: id and answer in each line; or answer, target (or targets, target_index), choices,"
            " ..., which needs no data. Required; default: none.",
            show_default=False,
        ),
    ],
    family: Annotated[
        str,
        typer.Option(help="Family of the prompts that were answered, which selects the metric: paligemma or llava."),
    ] = "paligemma",
    data: BenchmarkData = None,
    own: CatalogFiles = [],
    metric: Annotated[
        str | None,
        typer.Option(help="Another metric, as METRIC:VARIANT; default: the benchmark's.", show_default=False),
    ] = None,
    mask_decoder: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="The .npz file that the metric refseg_miou needs; default: none.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score answers that were made elsewhere, by the benchmark's own metric and with intervals."""
    from parcelray.evaluation.scoring.answers import score_answers

    scores = score_answers(
        name, answers, family=family, data=data, user_files=own, metric=metric, mask_decoder=mask_decoder
    )
    show(scores, as_json, lambda value: value.to_rich())


def pair(text: str, option: str, form: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not (separator and key and value):
        raise UserError(f"{option} is {text!r}; write {form}.")
    return key, value
