"""One evaluation job from its file to scores, tables and a record: what `parcelray evaluate`, training reports and pipelines call."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from parcelray.benchmarks.readers.base import Problem
from parcelray.cluster.session import ray_session
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import config_hash
from parcelray.errors import UserError
from parcelray.evaluation.passes.records import check_pin, read_asked
from parcelray.evaluation.passes.shards import BenchmarkPass, EvaluatedModel, PassSettings
from parcelray.evaluation.passes.worker import run_pass_in_process
from parcelray.evaluation.predict.predictor import BLIND
from parcelray.evaluation.progress import progress_bars
from parcelray.evaluation.results import REFERENCE_FOLDER, record_results, show, write_results
from parcelray.evaluation.scoring.evaluation import AskedBenchmark, Evaluation
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.evaluation.scoring.summary import Summary, summarize
from parcelray.evaluation.setup import PreparedBenchmark, budgets_for, pinned_job, prepare
from parcelray.models.checkpoint import ResolvedCheckpoint, content_digest
from parcelray.models.processor import image_size_of
from parcelray.models.vlm import connector_of
from parcelray.tracking.mlflow_tracker import tracked_run
from parcelray.tracking.provenance import flat_params, git_commit, resolve_model
from parcelray.tracking.run_folder import RunFolder
from parcelray.tracking.store import ensure_store


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished evaluation."""

    identity: str
    folder: Path
    """Tables, picture, result.json, and what was asked."""
    summary: Summary
    computed: int
    """Answers computed now."""
    present: int
    """Answers that were there."""
    mlflow_run_id: str | None


def run_evaluation(
    job: EvaluateJob,
    console: Console,
    *,
    address: str | None = None,
    parent_run_id: str | None = None,
    tables: bool = True,
) -> EvaluatedRun:
    """Evaluates a checkpoint as a job says; answers that are there already are not computed again.

    Args:
        job: the evaluation.
        console: for progress, tables and messages.
        address: Ray cluster; None: RAY_ADDRESS, else a local instance. Unused with `compute.actors: 0`.
        parent_run_id: MLflow run to nest under.
        tables: whether to print them.

    Raises:
        UserError: the job cannot run as it is written, its data drifted, or too many questions could not be asked.
        SystemFailure: the pass hangs.
    """
    uri = ensure_store(job.tracking.uri) if job.tracking.uri is not None else None
    checkpoint = resolve_model(job.model, uri)
    reference = resolve_model(job.reference, uri) if job.reference is not None else None
    run_folder = RunFolder(pinned_job(job, checkpoint, reference))
    run_folder.claim()
    folder = Path(run_folder.path) if run_folder.is_local else Path("runs") / "evaluate" / job.name
    benchmarks = prepare(job, image_size_of(checkpoint.path))
    for benchmark in benchmarks:
        before = read_asked(folder / "asked" / benchmark.config.name)
        check_pin(benchmark.config.name, benchmark.task.reader.fingerprint(), before.pin if before is not None else None)
    with (
        nullcontext() if job.compute.actors == 0 else ray_session(address),
        _tracked(job, run_folder, uri, checkpoint, parent_run_id) as run_id,
    ):
        evaluation, computed, present = _ask(
            job, job.name, checkpoint, budgets_for(job, checkpoint), benchmarks, folder, console
        )
        base: tuple[Evaluation, Sequence[SplitScores]] | None = None
        if reference is not None:
            full = (max(connector_of(reference.path).supported_budgets),)
            plain = [
                replace(
                    each,
                    task=replace(each.task, generation=replace(each.task.generation, reducer=None, anchor_grid=None)),
                )
                for each in benchmarks
            ]
            base_evaluation, more, there = _ask(
                job, f"{job.name}-{REFERENCE_FOLDER}", reference, full, plain, folder / REFERENCE_FOLDER, console
            )
            computed, present = computed + more, present + there
            base = (base_evaluation, base_evaluation.score())
        console.print(f"{computed} answers computed, {present} were there. Scoring", highlight=False)
        summary = summarize(evaluation, evaluation.score(), job.need_within, base)
        _check_unscored(summary, job.max_unscored)
        files = write_results(summary, folder)
        if tables:
            show(summary, console)
        console.print(f"Tables, picture and answers: {folder}", highlight=False)
        if run_id is not None and uri is not None:
            record_results(uri, run_id, summary, files)
    run_folder.finish(summary.to_dict())
    if not run_folder.is_local:
        run_folder.upload(folder, "results")
    return EvaluatedRun(run_folder.identity, folder, summary, computed, present, run_id)


def _ask(
    job: EvaluateJob,
    name: str,
    checkpoint: ResolvedCheckpoint,
    budgets: tuple[int, ...],
    benchmarks: Sequence[PreparedBenchmark],
    folder: Path,
    console: Console,
) -> tuple[Evaluation, int, int]:
    """One model on all benchmarks; answers go to the store, what was asked to the folder."""
    digest = content_digest(checkpoint.path)
    store = job.storage if "://" in job.storage else os.path.abspath(job.storage)
    model = EvaluatedModel(checkpoint.path, checkpoint.pinned, digest, budgets, f"{store}/predictions")
    shown = ", ".join("blind" if budget == BLIND else str(budget) for budget in budgets)
    console.print(f"Asking {checkpoint.pinned} at {shown} visual tokens an image", highlight=False)
    with progress_bars(console, {each.config.name: len(each.task.rows) for each in benchmarks}) as on_progress:
        passes = _pass(job)(
            [benchmark.task for benchmark in benchmarks], model, settings=_settings(job), on_progress=on_progress
        )
    evaluation = Evaluation(
        name=name,
        model=checkpoint.pinned,
        digest=digest,
        budgets=budgets,
        full=max(connector_of(checkpoint.path).supported_budgets),
        store=model.store,
        benchmarks=tuple(
            AskedBenchmark(each.config, passes[each.config.name].asked, each.choice.metric) for each in benchmarks
        ),
        mask_decoder=job.mask_decoder,
    )
    evaluation.save(folder)
    for benchmark in benchmarks:
        _check_asked(passes[benchmark.config.name], benchmark.config.name, job.max_unscored)
    return evaluation, sum(each.computed for each in passes.values()), sum(each.present for each in passes.values())


def _pass(job: EvaluateJob) -> Callable[..., dict[str, BenchmarkPass]]:
    if job.compute.actors == 0:
        return run_pass_in_process
    from parcelray.evaluation.passes.ray_pass import run_pass

    return run_pass


def _settings(job: EvaluateJob) -> PassSettings:
    settings = PassSettings(**job.compute.model_dump())
    if job.compute.actors == 0 and torch.cuda.is_available():
        return PassSettings(**job.compute.model_dump() | {"gpus_per_actor": 1.0})
    return settings


def _check_asked(done: BenchmarkPass, name: str, largest: float) -> None:
    problems, asked = done.asked.problems, len(done.asked.records)
    if problems and len(problems) > largest * (len(problems) + asked):
        raise UserError(
            f"{name}: {len(problems)} of {len(problems) + asked} questions could not be asked, more than max_unscored"
            f" {largest:g} allows; the first: {_first(problems)}. Mend the data, or raise max_unscored."
        )


def _check_unscored(summary: Summary, largest: float) -> None:
    for split in summary.splits:
        unscored = max(score.unscored for score in split.scores.values())
        if unscored > largest * len(split.samples):
            raise UserError(
                f"{split.name}: {unscored} of {len(split.samples)} questions cannot be scored by {split.metric}, more"
                f" than max_unscored {largest:g} allows. Mend the data, choose another metric, or raise max_unscored."
            )


def _first(problems: Sequence[Problem]) -> str:
    return "; ".join(f"{problem.row}: {problem.reason}" for problem in problems[:3])


@contextmanager
def _tracked(
    job: EvaluateJob, folder: RunFolder, uri: str | None, checkpoint: ResolvedCheckpoint, parent_run_id: str | None
) -> Iterator[str | None]:
    if uri is None:
        yield None
        return
    tags = {"parcel.config_hash": config_hash(job), "parcel.model": checkpoint.pinned}
    commit = git_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    params = flat_params(job.model_dump(mode="json", exclude={"benchmarks"})) | {
        "benchmarks": ", ".join(choice.name for choice in job.benchmarks)
    }
    with tracked_run(
        uri, job.tracking.experiment, folder.identity, params=params, tags=tags, parent_run_id=parent_run_id
    ) as run_id:
        yield run_id
