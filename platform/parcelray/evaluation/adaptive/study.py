"""`parcelray analyze adaptive`: evaluates a job, and measures the choice of a budget per image and question."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from parcelray.config.connector import ConnectorConfig
from parcelray.config.evaluate import BLIND, EvaluateJob
from parcelray.config.identity import config_hash
from parcelray.errors import UserError
from parcelray.evaluation.adaptive.adaptive_budget import (
    AFTER,
    BEFORE,
    FIXED,
    ORACLE,
    AdaptiveStudy,
    Signals,
    study_adaptive_budgets,
)
from parcelray.evaluation.adaptive.budget_policies import BudgetTable
from parcelray.evaluation.adaptive.budget_signals import ANSWER_SIGNALS, Floats, SignalReader, answer_signals
from parcelray.evaluation.adaptive.plot import plot_adaptive
from parcelray.evaluation.adaptive.tables import adaptive_table, calibration_table
from parcelray.evaluation.inputs import StudyModel, open_model
from parcelray.evaluation.plan import connector_at, prepare
from parcelray.evaluation.run import run_evaluation
from parcelray.evaluation.scoring.split_scores import SplitScores, cluster_of
from parcelray.models.vlm import config_of
from parcelray.profiling.backbone_shapes import BackboneShape, from_transformers_config
from parcelray.profiling.flops import cost, decoding_flops
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, tracked_run
from parcelray.tracking.store import ensure_store

_CHUNK = 256
"""Number of rows whose images are in memory at once."""
PREDICTOR_FOLDERS = {BEFORE: "predictor", AFTER: "predictor_after_smallest"}
"""Folders of the fitted predictors, for serving."""


@dataclass(frozen=True)
class AdaptiveRun:
    """A finished study."""

    study: AdaptiveStudy
    folder: Path
    """Folder with adaptive.json, adaptive.png, and a folder per predictor."""


def study_adaptive(job: EvaluateJob, console: Console, *, folder: Path, address: str | None = None) -> AdaptiveRun:
    """Runs an evaluation, computes the signals, and compares the rule and the predictors with fixed budgets.

    Args:
        job: the evaluation job, with two budgets or more.
        console: for progress and tables.
        folder: folder of the results.
        address: address of the Ray cluster, see `run_evaluation`.

    Raises:
        UserError: the job does not allow a choice per question: it has one budget, a corpus metric, or beam search.
    """
    summary = run_evaluation(job, console, address=address, tables=False).summary
    opened = open_model(job.model.reference, job.tracking.uri)
    if opened.checkpoint.pin.digest != summary.evaluation.digest:
        raise UserError(f"{job.model.reference} changed to another model during the evaluation; run the study again.")
    config = config_of(opened.checkpoint.path)
    connectors = {budget: connector_at(job, config, budget) for budget in summary.budgets if budget != BLIND}
    study = study_answers(job, summary.splits, opened, connectors)
    files = write_study(study, folder, model=summary.evaluation.model, name=job.name)
    console.print(adaptive_table(study))
    console.print(calibration_table(study))
    _record(job, study, files)
    console.print(f"Curves, plot and predictors: {folder}")
    return AdaptiveRun(study, folder)


def study_answers(
    job: EvaluateJob,
    splits: Sequence[SplitScores],
    opened: StudyModel,
    connectors: Mapping[int, ConnectorConfig | None],
) -> AdaptiveStudy:
    """Compares the rule and the predictors with fixed budgets on given answers.

    Args:
        job: the evaluation job of the answers; its images are read again, because evaluations do not store images.
        splits: the samples with their answers at each of the budgets.
        opened: the model of the answers.
        connectors: the connector of each budget, the smallest budget first.

    Raises:
        UserError: budgets cannot be chosen per question: answers have no own value or no confidence, or are too few.
    """
    for split in splits:
        _check_scorable(split)
    device = str(next(opened.model.parameters()).device)
    reader = SignalReader(opened.model, opened.processor, device=device, batch_size=job.compute.batch_size)
    smallest = next(iter(connectors))
    signals = Signals(
        before_NS=_read_signals(job, splits, reader, opened.processor.image_size),
        before_names=reader.names,
        answer_NS=answer_signals(answer for split in splits for answer in split.answers[smallest]),
        answer_names=tuple(f"answer_{name}" for name in ANSWER_SIGNALS),
    )
    table = _budget_table(splits, from_transformers_config(config_of(opened.checkpoint.path)), connectors, signals)
    return study_adaptive_budgets(table, signals, keep_within=job.need_within, seed=job.seed)


def write_study(study: AdaptiveStudy, folder: Path, *, model: str, name: str) -> list[Path]:
    """Writes the numbers, the plot and the predictors; returns their files and folders.

    Args:
        study: the study.
        folder: folder to write to.
        model: pinned reference of the evaluated model.
        name: name of the evaluation or search.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": model, "evaluation": name} | study.to_dict()
    (folder / "adaptive.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plot_adaptive(study, folder / "adaptive.png", title=f"{name}: choosing the budget per image and question")
    for method, part in PREDICTOR_FOLDERS.items():
        study.predictors[method].save(folder / part)
    return [folder / "adaptive.json", folder / "adaptive.png", *(folder / part for part in PREDICTOR_FOLDERS.values())]


def _budget_table(
    splits: Sequence[SplitScores],
    shape: BackboneShape,
    connectors: Mapping[int, ConnectorConfig | None],
    signals: Signals,
) -> BudgetTable:
    """Builds the table of answers with their values and costs."""
    budgets = tuple(connectors)
    sizes_N2 = signals.before_NS[
        :, [signals.before_names.index(name) for name in ("num_text_tokens", "num_images")]
    ].astype(int)
    encoding, passes = [], []
    answers = (
        dict(zip(budgets, given, strict=True))
        for split in splits
        for given in zip(*(split.answers[budget] for budget in budgets), strict=True)
    )
    for (length, frames), given in zip(sizes_N2.tolist(), answers, strict=True):
        costs = [
            cost(shape, connectors[budget], budget, num_frames=frames, num_text_tokens=length) for budget in budgets
        ]
        decoding = [decoding_flops(shape, frames * budget + length, given[budget].num_new_tokens) for budget in budgets]
        encoding.append(costs[0].vision_encoder)
        passes.append([each.total - each.vision_encoder + more for each, more in zip(costs, decoding, strict=True)])
    values_NB = np.array(
        [
            [split.scores[budget].values[index] for budget in budgets]
            for split in splits
            for index in range(len(split.samples))
        ]
    )
    return BudgetTable(
        budgets=budgets,
        splits=tuple(split.name for split in splits for _ in split.samples),
        scenes=tuple(cluster_of(sample) for split in splits for sample in split.samples),
        values_NB=values_NB,
        scales={split.name: split.scale for split in splits},
        log_probs_NB=np.array(
            [
                [split.answers[budget][index].mean_log_prob for budget in budgets]
                for split in splits
                for index in range(len(split.samples))
            ]
        ),
        encoding_N=np.array(encoding, dtype=np.float64),
        passes_NB=np.array(passes, dtype=np.float64),
    )


def _check_scorable(split: SplitScores) -> None:
    """Refuses a split whose answers have no own value or no confidence."""
    if not split.additive:
        raise UserError(
            f"{split.name} is scored by {split.metric}, which is not a mean over samples, so budgets cannot be chosen"
            " per question; leave the benchmark out."
        )
    if any(answer.mean_log_prob is None for answers in split.answers.values() for answer in answers):
        raise UserError(
            f"The answers on {split.name} have no confidence, because beam search records none; set decoding to greedy"
            " or likelihood."
        )
    if any(score.unscored for score in split.scores.values()):
        raise UserError(
            f"Some answers on {split.name} cannot be scored by {split.metric}; fix the data, or leave the benchmark"
            " out."
        )


def _read_signals(job: EvaluateJob, splits: Sequence[SplitScores], reader: SignalReader, image_size: int) -> Floats:
    """Computes the signals of the scored samples, in the order of the splits.

    Other samples of the benchmarks have problems, such as an image that cannot be decoded.
    """
    scored = {(split.benchmark, sample.id) for split in splits for sample in split.samples}
    found: dict[tuple[str, str], Floats] = {}
    for benchmark in prepare(job, image_size):
        rows = list(benchmark.rows)
        for start in range(0, len(rows), _CHUNK):
            samples = [
                sample
                for row in rows[start : start + _CHUNK]
                for sample in benchmark.reader.read(row).samples
                if (sample.benchmark, sample.id) in scored
            ]
            if not samples:
                continue
            found |= {
                (sample.benchmark, sample.id): signals_S
                for sample, signals_S in zip(samples, reader.read(samples), strict=True)
            }
    return np.stack([found[split.benchmark, sample.id] for split in splits for sample in split.samples])


def _record(job: EvaluateJob, study: AdaptiveStudy, files: Sequence[Path]) -> None:
    if job.tracking.uri is None:
        return
    uri = ensure_store(job.tracking.uri)
    name = f"analyze-adaptive-{job.name}-{config_hash(job)}"
    with tracked_run(
        uri,
        job.tracking.experiment,
        name,
        params={"budgets": ", ".join(map(str, study.budgets)), "questions": study.questions},
    ) as run_id:
        tracker = MlflowRunLogger(uri, run_id)
        for method in study.methods:
            for point in study.curve(method):
                # The cost is logged as the step, so that MLflow plots the curve.
                step = round(point.spent.tokens.value)
                metrics = {f"{method}/score": point.spent.score.value, f"{method}/gflops": point.spent.gflops.value}
                if method not in (FIXED, ORACLE):
                    metrics[f"{method}/gain_at_tokens"] = point.gain_at_tokens.value
                tracker.log_metrics(metrics, step)
        for each in study.calibration:
            errors = {"raw": each.raw, "temperature": each.with_temperature, "isotonic": each.with_isotonic}
            tracker.log_metrics(
                {f"calibration_error/{kind}": value for kind, value in errors.items()}, each.num_visual_tokens
            )
        for file in files:
            tracker.log_figure_file(file) if file.suffix == ".png" else tracker.log_artifact(file)
        tracker.close()
