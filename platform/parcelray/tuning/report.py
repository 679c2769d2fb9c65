"""The report of a search: its files and pictures, its tables on the console, and its metrics in MLflow."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.tune import TuneJob
from parcelray.evaluation.adaptive.study import write_study
from parcelray.evaluation.adaptive.tables import adaptive_table
from parcelray.models.manifest import MANIFEST_NAME
from parcelray.models.vlm import write_rerouted
from parcelray.tracking.mlflow_tracker import MlflowRunLogger
from parcelray.tracking.run_folder import RunFolder
from parcelray.tuning.plots import (
    FamilyRow,
    SearchPoint,
    plot_families,
    plot_importance,
    plot_parallel,
    plot_search,
    plot_splits,
    plot_volume,
)
from parcelray.tuning.progress import VOLUME, best_of, describe, show_value
from parcelray.tuning.results import SearchFindings, frontier_curves
from parcelray.tuning.selection import ChosenSplit, routing_of
from parcelray.tuning.trial_record import FinishedTrial


def write_findings(job: TuneJob, findings: SearchFindings, folder: Path) -> list[Path]:
    """Writes results.json, the pictures, and for a split search the model with the chosen routing.

    Returns:
        The files to log to MLflow; none if no trial succeeded.
    """
    if not findings.front:
        return []
    results = folder / "results.json"
    results.write_text(json.dumps(findings.to_dict(), indent=2) + "\n", encoding="utf-8")
    files = [results]
    if findings.volume:
        files.append(folder / "volume.png")
        plot_volume(findings.volume, files[-1], title=f"{job.name}: hypervolume over trials")
    points = _points(job, findings)
    first, *others = job.objectives
    if others:
        rule = [(point.x, point.y) for point in points if point.on_rule]
        files.append(folder / "frontier.png")
        plot_search(
            points,
            {name: members for name, members in findings.baselines.items() if members},
            sorted(rule),
            files[-1],
            title=f"{job.name}: {first.metric} against {others[0].metric}",
            axes=(others[0].metric, first.metric),
            curves=frontier_curves(findings.adaptive) if findings.adaptive is not None else {},
        )
    files.append(folder / "parallel.png")
    plot_parallel(
        [_row(job, trial) for trial in findings.trials if trial.error is None],
        [*job.space.parameters, first.metric],
        files[-1],
        title=job.name,
    )
    if findings.importance:
        files.append(folder / "importance.png")
        plot_importance(
            findings.importance,
            files[-1],
            title=f"{job.name}: share of the variance of {first.metric} that a parameter explains",
        )
    if findings.families:
        files.append(folder / "families.png")
        rows = [
            FamilyRow(
                each.family,
                findings.trials[each.trial].metrics["tokens"],
                each.retention,
                findings.trials[each.best].metrics["tokens"],
                each.best_retention,
            )
            for each in findings.families
        ]
        plot_families(rows, files[-1], title=f"{job.name}: retention by family, 95 % intervals")
    if findings.splits:
        files += _write_routing(job, findings, folder)
    if findings.adaptive is not None:
        files += write_study(findings.adaptive, folder / "adaptive", model=str(findings.source), name=job.name)
    return files


def show_findings(job: TuneJob, findings: SearchFindings, folder: RunFolder, console: Console) -> None:
    """Prints the Pareto front, the chosen splits and families, the best trial, and the next commands."""
    metrics = [objective.metric for objective in job.objectives]
    table = Table(
        "trial",
        *metrics,
        *(name.rpartition(".")[2] for name in job.space.parameters),
        title=f"{job.name}: Pareto front",
    )
    order = sorted(findings.front, key=lambda index: findings.trials[index].metrics.get(metrics[-1], 0.0))
    for index in order:
        trial = findings.trials[index]
        notes = ["knee"] * (index == findings.knee and len(metrics) > 1) + ["stopped"] * trial.stopped
        name = f"{trial.key} ({', '.join(notes)})" if notes else trial.key
        table.add_row(
            name,
            *(f"{trial.metrics[metric]:.4g}" for metric in metrics),
            *(show_value(trial.assignment.get(key, "-")) for key in job.space.parameters),
        )
    console.print(table)
    if findings.families:
        console.print(_family_table(job, findings))
    if findings.splits:
        console.print(_split_table(findings.splits))
        routing = json.dumps([route.model_dump() for route in routing_of(findings.splits, findings.full)]).replace(
            '"', ""
        )
        if (folder.local / "model").is_dir():
            console.print(f"Model with this routing: {folder.uri}/model")
        console.print(f"To train with it: --set 'connector.routing={routing}'", soft_wrap=True)
    if findings.adaptive is not None:
        console.print(adaptive_table(findings.adaptive))
    if findings.adaptive_problem is not None:
        console.print(f"No adaptive budgets: {findings.adaptive_problem}", markup=False)
    best = best_of(job, findings.trials)
    if best is not None:
        console.print(f"Best {metrics[0]}: {best.metrics[metrics[0]]:.4g} at {describe(best.assignment)}")
    if findings.importance:
        console.print(
            "Importance: " + ", ".join(f"{name} {value:.2f}" for name, value in findings.importance.items()),
        )
    if findings.stopped:
        console.print(
            f"{len(findings.stopped)} trials were stopped early; their metrics are those of their last report",
        )
    if findings.failed:
        console.print(
            f"{len(findings.failed)} trials failed; re-run them with --resume --retry-failed. The first error:"
            f" {findings.failed[0].error}",
            markup=False,
        )
    console.print(f"Numbers and pictures: {folder.uri}")


def record_findings(uri: str, run_id: str, findings: SearchFindings, files: Sequence[Path]) -> None:
    """Logs the hypervolume over trials, the curves and the files to the MLflow run of the search."""
    tracker = MlflowRunLogger(uri, run_id)
    for count, share in enumerate(findings.volume, 1):
        tracker.log_metrics({VOLUME: share}, count)
    counts = {"trials": len(findings.trials), "failed": len(findings.failed), "stopped": len(findings.stopped)}
    tracker.log_metrics({f"search/{name}": float(count) for name, count in counts.items()}, len(findings.trials))
    for name, points in findings.baselines.items():
        for point in points:
            # MLflow keeps the key under which baselines were first logged, so that old and new runs can be compared.
            tracker.log_metrics({f"rival/{name}": point.y}, point.num_visual_tokens)
    if findings.adaptive is not None:
        for label, curve in frontier_curves(findings.adaptive).items():
            for tokens, value in curve:
                tracker.log_metrics({f"adaptive/{label}": value}, round(tokens))
    for file in files:
        if file.is_file():
            tracker.log_figure_file(file) if file.suffix == ".png" else tracker.log_artifact(file)
    tracker.close()


def _points(job: TuneJob, findings: SearchFindings) -> list[SearchPoint]:
    if len(job.objectives) < 2:
        return []
    y, x = job.objectives[0].metric, job.objectives[1].metric
    rule = {(each.num_visual_tokens, each.rule) for each in findings.splits}
    points = []
    for index, trial in enumerate(findings.trials):
        if x in trial.metrics and y in trial.metrics:
            grid = trial.assignment.get(job.splits.anchor_grid) if job.splits is not None else None
            on_rule = (int(trial.metrics.get("tokens", 0)), grid) in rule
            points.append(
                SearchPoint(
                    trial.metrics[x], trial.metrics[y], index in findings.front, index == findings.knee, on_rule
                )
            )
    return points


def _row(job: TuneJob, trial: FinishedTrial) -> dict[str, Any]:
    first = job.objectives[0].metric
    return {**trial.assignment, first: trial.metrics.get(first)}


def _write_routing(job: TuneJob, findings: SearchFindings, folder: Path) -> list[Path]:
    assert isinstance(job.base, EvaluateJob)
    routing = routing_of(findings.splits, findings.full)
    file, heat = folder / "routing.yaml", folder / "splits.png"
    data = [route.model_dump() for route in routing]
    file.write_text(yaml.safe_dump({"connector.routing": data}, sort_keys=False), encoding="utf-8")
    cells = {
        (budget, int(trial.assignment[job.splits.anchor_grid])): trial.metrics[job.objectives[0].metric]
        for trial in findings.trials
        if trial.error is None and job.splits is not None
        for budget in [int(trial.metrics["tokens"])]
    }
    chosen = {each.num_visual_tokens: each.anchor_grid for each in findings.splits}
    rule = {each.num_visual_tokens: each.rule for each in findings.splits if each.rule is not None}
    plot_splits(cells, chosen, rule, heat, title=f"{job.name}: {job.objectives[0].metric} of every split")
    # A model folder without a manifest was not written by parcelray, so no variant of it is written.
    if findings.source is not None and (findings.source / MANIFEST_NAME).is_file():
        write_rerouted(findings.source, folder / "model", routing, f"tune-{job.name}")
    return [file, heat]


def _family_table(job: TuneJob, findings: SearchFindings) -> Table:
    columns = [name.rpartition(".")[2] for name in job.space.parameters]
    title = f"{job.name}: cheapest trial within one standard error of the best, by family"
    table = Table(
        "family",
        "retention [95 %]",
        "tokens",
        *columns,
        "best [95 %]",
        "tokens of the best",
        "trials within one standard error",
        title=title,
    )
    for each in findings.families:
        chosen, best = findings.trials[each.trial], findings.trials[each.best]
        values = (show_value(chosen.assignment.get(key, "-")) for key in job.space.parameters)
        shown = [
            f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"
            for interval in (each.retention, each.best_retention)
        ]
        table.add_row(
            each.family,
            shown[0],
            f"{chosen.metrics['tokens']:g}",
            *values,
            shown[1],
            f"{best.metrics['tokens']:g}",
            str(each.near),
        )
    return table


def _split_table(splits: Sequence[ChosenSplit]) -> Table:
    table = Table(
        "tokens",
        "anchors",
        "queries",
        "best",
        "paper's rule",
        "minus the rule, points [95 %]",
        title="Chosen split of every budget",
    )
    for each in splits:
        gap = each.against_rule
        anchors = each.anchor_grid**2
        shown = (
            "-"
            if gap is None
            else "same"
            if each.anchor_grid == each.rule
            else f"{gap.value:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]"
        )
        names = [f"{side} x {side}" if side else "none" for side in (each.anchor_grid, each.best)]
        table.add_row(
            str(each.num_visual_tokens),
            names[0],
            str(each.num_visual_tokens - anchors),
            names[1],
            "-" if each.rule is None else f"{each.rule} x {each.rule}",
            shown,
        )
    return table
