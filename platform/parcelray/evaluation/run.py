"""Runs one evaluation job, from its file to scores, tables and an MLflow run.

This is what `parcelray evaluate`, training reports, searches, promotions and pipelines call.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parcelray.cluster.node_inputs import check_inputs
from parcelray.cluster.session import ray_session
from parcelray.config.evaluate import EvaluateJob, PassConfig, budget_name
from parcelray.config.paths import AS_WRITTEN
from parcelray.errors import UserError
from parcelray.evaluation.passes.shards import (
    EvaluatedModel,
    OnProgress,
    PassResult,
    PreparedBenchmark,
    dtype_of,
)
from parcelray.evaluation.passes.store import EvaluatedBenchmark, PredictionStore, check_fingerprint
from parcelray.evaluation.passes.worker import ModelWorker, run_in_process
from parcelray.evaluation.plan import (
    budgets_for,
    evaluated_model,
    family_warnings,
    pinned_job,
    predictions_of,
    prepare,
)
from parcelray.evaluation.results import record_results, show, write_results
from parcelray.evaluation.scoring.evaluation import Evaluation
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.evaluation.scoring.summary import REFERENCE_FOLDER, Summary, summarize
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.vlm import connector_of, image_size_of
from parcelray.tracking.lineage import DATA_TAG, MODEL_IN_TAG
from parcelray.tracking.mlflow_tracker import job_run
from parcelray.tracking.registry import resolve_model
from parcelray.tracking.run_folder import RunFolder
from parcelray.tracking.store import ensure_store

_PROGRESS_LINES = 5
"""Number of progress lines per benchmark where the output is not a terminal."""


@dataclass(frozen=True)
class EvaluatedRun:
    """The result of a finished evaluation job."""

    identity: str
    folder: Path
    """Folder of this host with the tables, the plot, result.json and the evaluated samples."""
    uri: str
    """The run folder: on a disk the same folder, else its URI."""
    summary: Summary
    computed: int
    """Number of predictions that were computed."""
    present: int
    """Number of predictions that were reused from the store."""
    mlflow_run_id: str | None


def run_evaluation(
    job: EvaluateJob,
    console: Console,
    *,
    address: str | None = None,
    parent_run_id: str | None = None,
    tables: bool = True,
) -> EvaluatedRun:
    """Evaluates a checkpoint as described by a job; stored predictions are reused.

    Args:
        job: the evaluation job.
        console: for progress, tables and messages.
        address: address of the Ray cluster; None: RAY_ADDRESS, or else a local instance. Unused with
            `compute.actors: 0`.
        parent_run_id: parent of the MLflow run.
        tables: whether to print the tables.

    Raises:
        UserError: the job cannot run as written, its data changed since an earlier run, or too many samples could not
            be evaluated or scored.
        SystemFailure: the pass stalled.
    """
    uri = ensure_store(job.tracking.uri) if job.tracking.uri is not None else None
    checkpoint = resolve_model(job.model, uri)
    reference = resolve_model(job.reference, uri) if job.reference is not None else None
    run_folder = RunFolder(pinned_job(job, checkpoint, reference))
    with run_folder.claimed():
        folder = run_folder.local
        # For the comparison of the data with those of an earlier run.
        run_folder.pull()
        benchmarks = prepare(job, image_size_of(checkpoint.path))
        for benchmark in benchmarks:
            check_fingerprint(folder, benchmark.config.name, benchmark.reader.fingerprint())
        for warning in family_warnings(job, benchmarks, checkpoint, reference):
            console.print(f"Warning: {warning}", style="yellow", markup=False, soft_wrap=True)
        with (
            nullcontext() if job.compute.actors == 0 else _session(job, address, checkpoint, reference),
            job_run(
                job,
                uri,
                run_folder.identity,
                params=job.model_dump(mode="json", exclude={"benchmarks"}, context=AS_WRITTEN)
                | {"benchmarks": ", ".join(choice.name for choice in job.benchmarks)},
                tags={MODEL_IN_TAG: checkpoint.pinned, DATA_TAG: _fingerprints(benchmarks)},
                parent_run_id=parent_run_id,
            ) as run_id,
        ):
            evaluation, result = _evaluate_and_save(
                job, job.name, checkpoint, budgets_for(job, checkpoint), benchmarks, folder, console
            )
            computed, present = result.computed, result.present
            base: tuple[Evaluation, Sequence[SplitScores]] | None = None
            if reference is not None:
                full = (max(connector_of(reference.path).supported_budgets),)
                unreduced = [
                    replace(each, generation=replace(each.generation, reducer=None, anchor_grid=None))
                    for each in benchmarks
                ]
                name = f"{job.name}-{REFERENCE_FOLDER}"
                base_evaluation, result = _evaluate_and_save(
                    job, name, reference, full, unreduced, folder / REFERENCE_FOLDER, console
                )
                computed, present = computed + result.computed, present + result.present
                base = (base_evaluation, base_evaluation.score())
            console.print(f"{computed:,} predictions computed, {present:,} reused. Scoring.")
            summary = summarize(evaluation, evaluation.score(), job.need_within, base)
            _check_unscored(summary, job.max_unscored)
            files = write_results(summary, folder)
            if tables:
                show(summary, console)
            run_folder.push()
            console.print(f"Tables, plot and predictions: {run_folder.uri}")
            if run_id is not None and uri is not None:
                record_results(uri, run_id, summary, files)
        run_folder.finish(summary.to_dict())
        digests = [evaluation.digest, *([base[0].digest] if base is not None else [])]
        limit_predictions(job.storage, job, digests, console)
        return EvaluatedRun(run_folder.identity, folder, run_folder.uri, summary, computed, present, run_id)


def limit_predictions(storage: str, job: EvaluateJob, digests: Sequence[str], console: Console) -> None:
    """Deletes the oldest stored predictions beyond the limit of a job, except those of its models and benchmarks.

    Args:
        storage: folder or URI of the job that ran.
        job: the evaluation.
        digests: digests of the models whose predictions are kept.
        console: for a message.
    """
    limit_gb = job.storage_limits.predictions_gb
    if limit_gb is None:
        return
    store = PredictionStore(predictions_of(storage))
    in_use = [(choice.name, digest) for choice in job.benchmarks for digest in digests]
    deleted = store.limit(round(limit_gb * 2**30), in_use)
    if deleted:
        console.print(f"{deleted:,} files of old predictions were deleted, to keep all below {limit_gb:g} GiB.")


@contextmanager
def _session(
    job: EvaluateJob, address: str | None, checkpoint: ResolvedCheckpoint, reference: ResolvedCheckpoint | None
) -> Iterator[None]:
    """Connects to Ray, and checks that the nodes have the same models and data under the plain paths of the job."""
    with ray_session(address):
        pins = [model.pin for model in (checkpoint, reference) if model is not None]
        check_inputs(pins, [choice.data for choice in job.benchmarks])
        yield


def evaluate_model(
    name: str,
    model: EvaluatedModel,
    benchmarks: Sequence[PreparedBenchmark],
    settings: PassConfig,
    *,
    mask_decoder: str | None = None,
    worker: ModelWorker | None = None,
    on_progress: OnProgress = lambda benchmark, rows, total: None,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Evaluation, PassResult]:
    """Runs one pass of a model over benchmarks: in this process with a worker or without actors, else on Ray.

    Args:
        name: name of the evaluation.
        model: the model, its budgets, and the store of its predictions.
        benchmarks: the benchmarks to evaluate.
        settings: use of the cluster.
        mask_decoder: the .npz file that the metric `refseg_miou` needs.
        worker: a worker in this process that already holds the model.
        on_progress: called after each shard.
        say: called with a sentence if the pass waits for resources of the cluster, or if a worker died.

    Returns:
        The evaluation, ready to be scored, and the result of the pass.
    """
    if worker is None and settings.actors == 0:
        threads = settings.threads_per_actor or torch.get_num_threads()
        settings = settings.model_copy(update={"threads_per_actor": threads})
        worker = ModelWorker(model, settings, dtype_of(benchmarks))
    if worker is not None:
        result = run_in_process(benchmarks, model, worker, settings, on_progress)
    else:
        from parcelray.evaluation.passes.ray_pass import run_on_ray

        result = run_on_ray(benchmarks, model, settings, on_progress, say=say)
    evaluation = Evaluation(
        name=name,
        model=model.pin.name,
        digest=model.digest,
        budgets=model.budgets,
        full=max(connector_of(model.folder).supported_budgets),
        store=model.store,
        benchmarks=result.benchmarks,
        mask_decoder=mask_decoder,
    )
    return evaluation, result


def _evaluate_and_save(
    job: EvaluateJob,
    name: str,
    checkpoint: ResolvedCheckpoint,
    budgets: tuple[int, ...],
    benchmarks: Sequence[PreparedBenchmark],
    folder: Path,
    console: Console,
) -> tuple[Evaluation, PassResult]:
    """Evaluates one checkpoint on all benchmarks of a job, and saves the evaluation into a folder."""
    model = evaluated_model(checkpoint, budgets, job.storage)
    names = ", ".join(map(budget_name, budgets))
    console.print(f"Evaluating {checkpoint.pinned} at budgets {names} (visual tokens per image)")
    settings = job.compute
    if settings.actors == 0 and torch.cuda.is_available():
        settings = settings.model_copy(update={"gpus_per_actor": 1.0})
    with _progress_bars(console, {each.config.name: len(each.rows) for each in benchmarks}) as on_progress:
        evaluation, result = evaluate_model(
            name,
            model,
            benchmarks,
            settings,
            mask_decoder=job.mask_decoder,
            on_progress=on_progress,
            say=lambda line: console.print(line, markup=False, soft_wrap=True),
        )
    evaluation.save(folder)
    for benchmark in result.benchmarks:
        _check_evaluated(benchmark, job.max_unscored)
    return evaluation, result


def _check_evaluated(benchmark: EvaluatedBenchmark, max_unscored: float) -> None:
    problems, total = benchmark.problems, len(benchmark.problems) + len(benchmark.records)
    if problems and len(problems) > max_unscored * total:
        first = "; ".join(f"{problem.row}: {problem.reason.removesuffix('.')}" for problem in problems[:3])
        raise UserError(
            f"{benchmark.config.name}: {len(problems)} of {total} samples could not be evaluated, more than"
            f" max_unscored {max_unscored:g} allows; the first: {first}. Fix the data, or raise max_unscored."
        )


def _fingerprints(benchmarks: Sequence[PreparedBenchmark]) -> str:
    """The data of an evaluation in one line: benchmark, revision and digest of the row ids."""
    found = [(benchmark.config.name, benchmark.reader.fingerprint()) for benchmark in benchmarks]
    return ", ".join(f"{name} {each.revision} ids sha256:{each.ids[:16]}" for name, each in found)


def _check_unscored(summary: Summary, max_unscored: float) -> None:
    for split in summary.splits:
        unscored = max(score.unscored for score in split.scores.values())
        if unscored > max_unscored * len(split.samples):
            raise UserError(
                f"{split.name}: {unscored} of {len(split.samples)} samples cannot be scored by {split.metric}, more"
                f" than max_unscored {max_unscored:g} allows. Fix the data, choose another metric, or raise"
                " max_unscored."
            )


@contextmanager
def _progress_bars(console: Console, totals: Mapping[str, int]) -> Iterator[OnProgress]:
    """Shows a bar per benchmark with rows/s and the remaining time; without a terminal, prints a few lines instead."""
    if not console.is_terminal:
        yield _progress_lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bars = {name: progress.add_task(name, total=total, speed="") for name, total in totals.items()}

        def show_rows(name: str, rows: int, total: int) -> None:
            speed = progress.tasks[bars[name]].speed
            progress.update(bars[name], completed=rows, total=total, speed=f"{speed:.1f} rows/s" if speed else "")

        yield show_rows


def _progress_lines(console: Console) -> Callable[[str, int, int], None]:
    shown: dict[str, int] = {}
    began = time.monotonic()

    def write(name: str, rows: int, total: int) -> None:
        part = rows * _PROGRESS_LINES // total
        if part > shown.get(name, 0):
            shown[name] = part
            speed = rows / max(time.monotonic() - began, 1e-9)
            console.print(
                f"{name}: {rows} of {total} rows, {speed:.1f} rows/s, about {(total - rows) / speed:.0f} s left",
            )

    return write
