"""Tables, pictures and MLflow records of the study of training-free reduction."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from parcelray.evaluation.frontier import frontier_markdown, write_frontier
from parcelray.evaluation.scoring.aggregate import FrontierPoint
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.studies.reduction.comparisons import PairwiseResult, table_rows
from parcelray.studies.reduction.methods import RANDOM, RANDOM_SEEDS, SPATIAL
from parcelray.studies.reduction.plots import plot_compute, plot_kinds
from parcelray.studies.reduction.results import ReductionStudy
from parcelray.studies.reduction.warnings import describe
from parcelray.tracking.mlflow_tracker import MlflowRunLogger

_COLOURED = (RANDOM["image"], SPATIAL["image"], "cluster", "average pooling", "class attention", "FastV")
"""Methods drawn in colour in a picture that has too many methods to distinguish."""


def pairwise_table(results: Sequence[PairwiseResult], baseline: str) -> Table:
    """Returns a table of the tests of all methods against a baseline."""
    table = Table(
        "method",
        "tokens",
        "difference, points [95 %]",
        "p",
        "p, Holm",
        "sd over seeds",
        title=f"Paired difference to {baseline} with the same token placement",
    )
    for each in results:
        spread = f"{each.spread:.1f}" if each.spread is not None else "-"
        table.add_row(
            each.method,
            str(each.num_visual_tokens),
            _signed(each.difference),
            f"{each.p_value:.4f}",
            f"{each.p_holm:.3f}",
            spread,
        )
    return table


def operating_table(study: ReductionStudy) -> Table:
    """Returns a table of the operating points on the Pareto front."""
    table = Table(
        "GFLOPs",
        "method",
        "tokens",
        "score [95 %]",
        "",
        title="Operating points on the Pareto front of score and compute",
    )
    for point in study.operating:
        score = f"{point.overall.value:.1f} [{point.overall.low:.1f}, {point.overall.high:.1f}]"
        table.add_row(
            f"{point.gflops:.3g}",
            point.method,
            str(point.num_visual_tokens),
            score,
            "knee" if point == study.knee else "",
        )
    return table


def write_study(study: ReductionStudy, name: str) -> list[Path]:
    """Writes all tables and pictures into the folder of the study, and returns their paths."""
    folder = study.folder
    numbers, picture = write_frontier(study.frontier, folder, f"{name}: score against visual tokens")
    compute, kinds = folder / "accuracy_against_compute.png", folder / "fine_grained.png"
    title = f"{name}: training-free reduction, {RANDOM_SEEDS} seeds of random sampling"
    plot_compute(study.frontier, study.groups, compute, title=title, baselines=tuple(RANDOM.values()))
    table, warnings = folder / "frontier.md", folder / "failure_signs.txt"
    table.write_text(frontier_markdown(study.frontier) + "\n", encoding="utf-8")
    warnings.write_text(describe(study.warnings) + "\n", encoding="utf-8")
    fine = [(point.method, point.kind, point.num_visual_tokens, point.retention) for point in study.fine]
    files = [numbers, table, warnings, picture, compute]
    if fine:
        plot_kinds(fine, kinds, title=f"{name}: percent of the full score, by kind of question", shown=_COLOURED)
        files.append(kinds)
    tables: dict[str, Sequence[Mapping[str, object]]] = {
        "against_random": table_rows(study.against_random),
        "against_spatial": table_rows(study.against_spatial),
        "against_best": table_rows(study.against_best),
        "breaks": [each._asdict() for each in study.breakpoints],
        "fine_grained": [
            {"method": method, "kind": kind, "num_visual_tokens": budget, **_interval(kept)}
            for method, kind, budget, kept in fine
        ],
        "operating_points": [_operating(point, point == study.knee) for point in study.operating],
    }
    return files + [_write_csv(folder / f"{stem}.csv", rows) for stem, rows in tables.items() if rows]


def record_study(uri: str, run_id: str, study: ReductionStudy, files: Sequence[Path]) -> None:
    """Logs the scores and files to the MLflow run of the study; the step of a score is the budget."""
    tracker = MlflowRunLogger(uri, run_id)
    for point in study.frontier.points:
        metrics = {f"{slug(point.method)}/score": point.overall.value}
        if point.retention is not None:
            metrics[f"{slug(point.method)}/retention"] = point.retention.value
        tracker.log_metrics(metrics, point.num_visual_tokens)
    for file in files:
        tracker.log_figure_file(file) if file.suffix == ".png" else tracker.log_artifact(file)
    tracker.close()


def slug(name: str) -> str:
    """Returns the name of a method as used in the names of runs and metrics."""
    return name.replace(", ", "-").replace(" ", "_").replace("+", "_plus").lower()


def _write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _operating(point: FrontierPoint, is_knee: bool) -> dict[str, object]:
    score = _interval(point.overall)
    return {
        "method": point.method,
        "num_visual_tokens": point.num_visual_tokens,
        "gflops": point.gflops,
        **score,
        "knee": is_knee,
    }


def _interval(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
