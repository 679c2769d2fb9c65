"""The command line: one thin function per command. Heavy imports wait until a command runs, so `--help` is quick."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from parcelray import __version__
from parcelray.errors import ParcelrayError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from parcelray.config.loader import Job
    from parcelray.profiling.measure import Report


class _DefaultToRun(TyperGroup):
    """A group whose first word may be a job file: then it runs it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Puts `run` before a word that is no command."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="One vision-language model, any visual-token budget: on Ray."
)
config_app = typer.Typer(no_args_is_help=True, help="Read, check and explain job files.")
jobs_app = typer.Typer(no_args_is_help=True, help="Jobs on a Ray cluster.")
evaluate_app = typer.Typer(no_args_is_help=True, cls=_DefaultToRun, help="Evaluate a checkpoint at every budget: `parcelray evaluate jobs/evaluate/mini.yaml`.")
benchmarks_app = typer.Typer(no_args_is_help=True, help="The benchmarks, and whether your data fit them.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure, side by side in one run.")
app.add_typer(config_app, name="config")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(benchmarks_app, name="benchmarks")
app.add_typer(jobs_app, name="jobs")
app.add_typer(bench_app, name="bench")

JobFile = Annotated[Path, typer.Argument(help="A job file, such as jobs/train/nlvr_parcel.yaml.", show_default=False)]
Set = Annotated[list[str], typer.Option("--set", help="Change a value of the job: a.b=value. Repeatable.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the resolved plan and its estimates, and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else a local instance.", show_default=False)]
JobsAddress = Annotated[str | None, typer.Option(help="URL of the cluster's dashboard, such as http://127.0.0.1:8265.", show_default=False)]
SubmissionId = Annotated[str, typer.Argument(help="The job's id, as `parcelray jobs list` shows it.", show_default=False)]


@app.callback(invoke_without_command=True)
def _version(show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if show:
        _console().print(f"parcelray {__version__}", highlight=False)
        raise typer.Exit


@app.command()
def train(job_file: JobFile, overrides: Set = [], dry_run: DryRun = False, address: Address = None, as_json: AsJson = False) -> None:  # noqa: B006 - typer's idiom
    """Train the model of a job file; the same command goes on with an interrupted run."""
    from parcelray.config.loader import load_job_of
    from parcelray.config.train import TrainJob

    job = load_job_of(TrainJob, job_file, overrides)
    console = _console(stderr=as_json)
    if dry_run:
        from parcelray.cluster.plan import training_plan

        _show(training_plan(job), as_json, lambda plan: plan.to_rich())
        return
    from parcelray.cluster.training_run import run_training

    run = run_training(job, console, address=address)
    if as_json:
        _write_json(
            {"identity": run.identity, "model": str(run.model_folder), "metrics": run.metrics, "mlflow_run_id": run.mlflow_run_id, "was_done": run.was_done}
        )


@evaluate_app.command("run")
def evaluate_run(job_file: JobFile, overrides: Set = [], dry_run: DryRun = False, address: Address = None, as_json: AsJson = False) -> None:  # noqa: B006
    """Evaluate the checkpoint of a job file; the same command goes on with an interrupted run, and computes only what is missing."""
    from parcelray.config.evaluate import EvaluateJob
    from parcelray.config.loader import load_job_of

    job = load_job_of(EvaluateJob, job_file, overrides)
    if dry_run:
        from parcelray.cluster.evaluation_plan import evaluation_plan

        _show(evaluation_plan(job), as_json, lambda plan: plan.to_rich())
        return
    from parcelray.cluster.evaluation_run import run_evaluation

    run = run_evaluation(job, _console(stderr=as_json), address=address)
    if as_json:
        _write_json(run.summary.to_dict() | {"computed": run.computed, "present": run.present, "folder": str(run.folder), "mlflow_run_id": run.mlflow_run_id})


@evaluate_app.command("score")
def evaluate_score(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished evaluation, such as runs/evaluate/mini.", show_default=False)],
    metrics: Annotated[list[str], typer.Option("--metric", help="BENCHMARK=METRIC:VARIANT instead of its own. Repeatable.", show_default=False)] = [],  # noqa: B006
    need_within: Annotated[float, typer.Option(help="Percent of the full score that the needed budget may lose.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Score a finished evaluation again, without the model and the data."""
    from parcelray.cluster.evaluation_results import rescore, show

    chosen = dict(_pair(text, "--metric", "BENCHMARK=METRIC:VARIANT") for text in metrics)
    summary = rescore(folder, chosen, need_within)
    _write_json(summary.to_dict()) if as_json else show(summary, _console())


@evaluate_app.command("compare")
def evaluate_compare(
    first: Annotated[str, typer.Argument(help="Folder of an evaluation, with @BUDGET for one budget: runs/evaluate/mini@64.", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another, or the same at another budget.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare two evaluations, or two budgets of one, on the same samples: paired bootstrap and McNemar's test."""
    from parcelray.cluster.comparing import compare_evaluations

    _show(compare_evaluations(first, second), as_json, lambda value: value.to_rich())


@evaluate_app.command("aggregate")
def evaluate_aggregate(
    table: Annotated[Path, typer.Argument(help="CSV with a row per benchmark: benchmark, family, reference, and a column per method.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """The aggregate rows of a printed table: mean retention by family and overall, and the splits that lose most."""
    from parcelray.evaluation.printed_table import aggregate_table

    _show(aggregate_table(table), as_json, lambda value: value.to_rich())


@evaluate_app.command("seeds")
def evaluate_seeds(
    folders: Annotated[list[Path], typer.Argument(help="Folders of the same evaluation of models trained with different seeds.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Mean and standard deviation over seeds."""
    from parcelray.cluster.comparing import over_seeds

    _show(over_seeds(folders), as_json, lambda value: value.to_rich())


@benchmarks_app.command("list")
def benchmarks_list(
    only: Annotated[str | None, typer.Option("--set", help="Only of a set: parcel, paligemma, llava or local.", show_default=False)] = None,
    own: Annotated[list[Path], typer.Option("--catalog", help="YAML file or folder with your own. Repeatable.", show_default=False)] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """List the benchmark splits."""
    from parcelray.cluster.benchmark_pages import Listing

    _show(Listing.of(own, only), as_json, lambda value: value.to_rich())


@benchmarks_app.command("show")
def benchmarks_show(
    name: Annotated[str, typer.Argument(help="As `list` shows it.", show_default=False)],
    own: Annotated[list[Path], typer.Option("--catalog", help="YAML file or folder with your own. Repeatable.", show_default=False)] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Everything that is known of one split, as the YAML that describes it."""
    import yaml

    from parcelray.benchmarks.catalog import catalog, find

    data = find(name, catalog(own)).model_dump(mode="json", exclude_defaults=True)
    _write_json(data) if as_json else sys.stdout.write(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=140))


@benchmarks_app.command("check")
def benchmarks_check(
    name: Annotated[str, typer.Argument(help="As `list` shows it.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="File or folder of its data; default: the Hugging Face hub.", show_default=False)] = None,
    own: Annotated[list[Path], typer.Option("--catalog", help="YAML file or folder with your own. Repeatable.", show_default=False)] = [],  # noqa: B006
    rows: Annotated[int, typer.Option(min=1, help="Rows to read and decode.")] = 1000,
    family: Annotated[str, typer.Option(help="In whose words: paligemma or llava.")] = "paligemma",
    as_json: AsJson = False,
) -> None:
    """Check that data fit a benchmark: columns, ids, images, answers, and the number of rows. Exit code 2 if something is wrong."""
    from parcelray.cluster.benchmark_pages import check_data

    report = check_data(name, data, own, rows, family)
    _show(report, as_json, lambda value: value.to_rich())
    if report.problems:
        raise typer.Exit(2)


@config_app.command("validate")
def config_validate(job_file: JobFile, overrides: Set = []) -> None:  # noqa: B006
    """Check a job file; exit code 2 and one line per mistake if it is not legal."""
    from parcelray.config.loader import identity

    _console().print(f"{job_file} is legal: {identity(_load(job_file, overrides))}", highlight=False, soft_wrap=True)


@config_app.command("show")
def config_show(job_file: JobFile, overrides: Set = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Print the job with every default filled in."""
    import yaml

    data = _load(job_file, overrides).model_dump(mode="json")
    _write_json(data) if as_json else sys.stdout.write(yaml.safe_dump(data, sort_keys=False))


@config_app.command("schema")
def config_schema(kind: Annotated[str, typer.Argument(help="Kind of job.")] = "train") -> None:
    """Print the JSON schema of a kind of job, for editors."""
    from parcelray.config.loader import JOB_MODELS

    if kind not in JOB_MODELS:
        raise UserError(f"kind is {kind!r}; legal: {', '.join(JOB_MODELS)}. Give one of them.")
    _write_json(JOB_MODELS[kind].model_json_schema())


@app.command()
def flops(
    backbone: Annotated[str, typer.Option(help="paligemma2-3b, mini, or a folder with a config.json.")] = "paligemma2-3b",
    resolution: Annotated[int | None, typer.Option(help="Image side in pixels; default: the backbone's own.", show_default=False)] = None,
    budgets: Annotated[str, typer.Option(help="Visual tokens per image, separated by commas.")] = "16,64,256",
    frames: Annotated[str, typer.Option(help="Frames (1: an image), separated by commas.")] = "1",
    connector: Annotated[str, typer.Option(help="parcel, mqt, m3, identity or an ablation.")] = "parcel",
    text_tokens: Annotated[int | None, typer.Option(help="Text tokens; default: the paper's.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Compute cost: FLOPs of every term, KV-cache bytes, and the saving against no compression."""
    from parcelray.profiling.cost_table import build

    table = build(
        backbone,
        resolution=resolution,
        budgets=_integers(budgets, "--budgets"),
        frames=_integers(frames, "--frames"),
        connector=connector,
        text_tokens=text_tokens,
    )
    _show(table, as_json, lambda value: value.to_rich())


@app.command()
def submit(
    job_file: JobFile,
    overrides: Set = [],  # noqa: B006
    address: JobsAddress = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the logs to the end; the exit code is the job's.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Run a finished job once more.")] = False,
    dry_run: DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan of --dry-run as JSON.")] = False,
) -> None:
    """Send a job file to a Ray cluster. Sending the same job twice runs it once."""
    from parcelray.cluster import jobs
    from parcelray.config.loader import identity

    job = _load(job_file, overrides)
    _warn_of_lost_paths(job)
    if dry_run:
        _show(jobs.plan_submission(job_file, identity=identity(job), address=address, overrides=overrides), as_json, lambda plan: plan.to_rich())
        return
    sent = jobs.submit(job_file, identity=identity(job), address=address, overrides=overrides, again=again)
    _console().print(sent.message, highlight=False, soft_wrap=True)
    if wait:
        raise typer.Exit(jobs.wait(sent.submission_id, address=address, write=sys.stdout.write).exit_code)


@jobs_app.command("list")
def jobs_list(address: JobsAddress = None, as_json: AsJson = False) -> None:
    """List the cluster's jobs, newest first."""
    from parcelray.cluster import jobs

    _print_states(jobs.list_jobs(address=address), as_json)


@jobs_app.command("status")
def jobs_status(submission_id: SubmissionId, address: JobsAddress = None, as_json: AsJson = False) -> None:
    """Show one job."""
    from parcelray.cluster import jobs

    _print_states([jobs.status(submission_id, address=address)], as_json)


@jobs_app.command("logs")
def jobs_logs(
    submission_id: SubmissionId, address: JobsAddress = None, follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False
) -> None:
    """Print a job's logs."""
    from parcelray.cluster import jobs

    for piece in jobs.logs(submission_id, address=address, follow=follow):
        sys.stdout.write(piece)


@jobs_app.command("stop")
def jobs_stop(submission_id: SubmissionId, address: JobsAddress = None) -> None:
    """Stop a job."""
    from parcelray.cluster import jobs

    _print_states([jobs.stop(submission_id, address=address)], as_json=False)


@bench_app.command("train")
def bench_train(
    steps: Annotated[int, typer.Option(min=4, help="Steps per measured run.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Steps per second of Ray Train with one worker over the same loop in this process."""
    from parcelray.cluster.train_bench import bench_training

    _show_report(bench_training(steps=steps, repeats=repeats), as_json)


@bench_app.command("evaluate")
def bench_evaluate(
    samples: Annotated[int, typer.Option(min=256, help="Samples of the comparison with a plain loop.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each comparison.")] = 3,
    small: Annotated[int, typer.Option(min=500, help="Samples of the smaller evaluation whose memory is measured.")] = 5000,
    large: Annotated[int, typer.Option(min=1000, help="Samples of the larger one.")] = 20000,
    as_json: AsJson = False,
) -> None:
    """All budgets in one pass, shared images, Ray Data against a plain loop, and peak memory."""
    from parcelray.cluster.evaluate_bench import bench_evaluation

    _show_report(bench_evaluation(samples=samples, repeats=repeats, memory_samples=(small, large)), as_json)


@bench_app.command("connector")
def bench_connector(
    backbone: Annotated[str, typer.Option(help="mini, paligemma2-3b (needs a GPU), or a folder.")] = "mini",
    resolution: Annotated[int | None, typer.Option(help="Image side in pixels.", show_default=False)] = None,
    budgets: Annotated[str, typer.Option(help="Visual tokens per image, separated by commas.")] = "16,64,256",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    repeats: Annotated[int, typer.Option(min=2, help="Measured rounds.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time and memory of each connector, and its share of the prefill, by budget."""
    from parcelray.profiling.connector_bench import bench_connectors

    report = bench_connectors(backbone, _integers(budgets, "--budgets"), batch_size=batch_size, repeats=repeats, device=device, resolution=resolution)
    _show_report(report, as_json)


@bench_app.command("kmeans")
def bench_kmeans(
    widths: Annotated[str, typer.Option(help="Widths of the tokens, separated by commas.")] = "1024,4096",
    clusters: Annotated[str, typer.Option(help="Numbers of clusters, separated by commas.")] = "32,64,128",
    batch_sizes: Annotated[str, typer.Option(help="Images at a time, separated by commas.")] = "1,8,32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Our K-means for visual tokens beside scikit-learn's and three other libraries'."""
    from parcelray.profiling.kmeans_bench import bench_kmeans

    report = bench_kmeans(
        widths=_integers(widths, "--widths"),
        clusters=_integers(clusters, "--clusters"),
        batch_sizes=_integers(batch_sizes, "--batch-sizes"),
        repeats=repeats,
    )
    _show_report(report, as_json)


@bench_app.command("overhead")
def bench_overhead(
    budgets: Annotated[str, typer.Option(help="Visual tokens of 576, separated by commas.")] = "196,144,64,36",
    batch_sizes: Annotated[str, typer.Option(help="Images at a time, separated by commas.")] = "1,8",
    reducers: Annotated[
        str, typer.Option(help="Reducers, separated by commas.")
    ] = "cluster_aggregate,average_pooling,spatial_sampling,random_sampling,divprune",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    as_json: AsJson = False,
) -> None:
    """What each training-free reduction costs against what the shorter prompt saves."""
    from parcelray.profiling.overhead_bench import bench_overhead

    report = bench_overhead(
        budgets=_integers(budgets, "--budgets"), batch_sizes=_integers(batch_sizes, "--batch-sizes"), reducers=reducers.split(","), repeats=repeats
    )
    _show_report(report, as_json)


def main() -> None:
    """Runs the command line; a user's mistake is one message and exit code 2, a failure of the system exit code 1."""
    try:
        app()
    except UserError as error:
        _console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except ParcelrayError as error:
        _console(stderr=True).print(f"failed: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _load(job_file: Path, overrides: list[str]) -> "Job":
    from parcelray.config.loader import load_job

    return load_job(job_file, overrides)


def _warn_of_lost_paths(job: "Job") -> None:
    local = [name for name, value in (("storage", job.storage), ("tracking.uri", job.tracking.uri or "")) if "://" not in value.replace("sqlite:///", "")]
    if local:
        _console(stderr=True).print(
            f"warning: {' and '.join(local)} are local paths; on the cluster they lie in the job's own copy of the project, which goes with it. "
            "Set them to storage and a tracking server that all nodes reach.",
            style="yellow",
            soft_wrap=True,
        )


def _print_states(states: list[Any], as_json: bool) -> None:
    if as_json:
        _write_json(
            [{"submission_id": state.submission_id, "status": state.status, "message": state.message, "entrypoint": state.entrypoint} for state in states]
        )
        return
    from rich.table import Table

    table = Table("job", "status", "started", "message")
    for state in states:
        table.add_row(state.submission_id, state.status, f"{state.started:%Y-%m-%d %H:%M:%S}" if state.started else "", state.message or "")
    _console().print(table)


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not (separator and key and value):
        raise UserError(f"{option} is {text!r}; write {form}.")
    return key, value


def _integers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is {text!r}; give whole numbers separated by commas, such as 16,64,256.") from None


def _show(value: Any, as_json: bool, render: Callable[[Any], Any]) -> None:
    if as_json:
        _write_json(value.to_dict())
    else:
        _console().print(render(value))


def _show_report(report: "Report", as_json: bool) -> None:
    _show(report, as_json, lambda value: value.to_rich())


def _write_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def _console(*, stderr: bool = False) -> "Console":
    from parcelray.reports.console import open_console

    return open_console(stderr=stderr)


if __name__ == "__main__":
    main()
