"""What an evaluation leaves behind: tables, a picture, the scores of every sample, and its MLflow run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from parcelray.evaluation.plot import plot_evaluation
from parcelray.evaluation.scoring.evaluation import load_evaluation
from parcelray.evaluation.scoring.summary import Summary, summarize
from parcelray.evaluation.tables import evaluation_csv, evaluation_markdown, evaluation_tables, notes
from parcelray.tracking.mlflow_tracker import MlflowRunLogger

REFERENCE_FOLDER = "reference"
"""Where an evaluation keeps that of its reference model."""


def rescore(folder: Path, metrics: Mapping[str, str], need_within: float) -> Summary:
    """Scores a finished evaluation again from its answers, without the model and the data.

    Args:
        folder: of the evaluation.
        metrics: by benchmark, metric and variant instead of the evaluation's own.
        need_within: percent of the full score that the needed budget may lose.
    """
    evaluation = load_evaluation(folder)
    base = None
    if (folder / REFERENCE_FOLDER).is_dir():
        reference = load_evaluation(folder / REFERENCE_FOLDER)
        base = (reference, reference.score(metrics))
    return summarize(evaluation, evaluation.score(metrics), need_within, base)


def write_results(summary: Summary, folder: Path) -> list[Path]:
    """Writes the tables, the scores of every sample and the picture; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"result.csv": evaluation_csv(summary), "result.md": evaluation_markdown(summary)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(summary.to_dict(), indent=2) + "\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(list(_samples(summary))), folder / "samples.parquet")
    plot_evaluation(summary, folder / "result.png")
    return [folder / name for name in ("result.json", *files, "samples.parquet", "result.png")]


def show(summary: Summary, console: Console) -> None:
    """Prints the tables and the notes."""
    for table in evaluation_tables(summary):
        console.print(table)
    for note in notes(summary):
        console.print(f"Note: {note}.")


def record_results(uri: str, run_id: str, summary: Summary, files: Sequence[Path]) -> None:
    """Metrics named `<split>/<metric>` with the budget as the step, so that MLflow draws the frontier."""
    tracker = MlflowRunLogger(uri, run_id)
    for budget in summary.budgets:
        metrics = {
            f"{split.name}/{name}": value
            for split in summary.splits
            for name, value in split.scores[budget].totals.items()
        }
        metrics |= {f"{name}/retention": kept.value for name, kept in summary.retention[budget].items()}
        metrics |= {
            "all/score": summary.mean_score(budget).value,
            "all/retention": summary.mean_retention(budget).value,
        }
        tracker.log_metrics({name: value for name, value in metrics.items() if value == value}, budget)
    for file in files:
        tracker.log_figure_file(file) if file.suffix == ".png" else tracker.log_artifact(file)
    tracker.close()


def _samples(summary: Summary) -> Iterator[dict[str, Any]]:
    """One row per question and budget."""
    for split in summary.splits:
        for budget, score in split.scores.items():
            for sample, answer, value in zip(split.samples, split.answers[budget], score.values, strict=True):
                yield {
                    "split": split.name,
                    "sample_id": sample.id,
                    "cluster": sample.scene,
                    "num_visual_tokens": budget,
                    "prompt": sample.prompt,
                    "right": list(sample.answers),
                    "answer": answer.text,
                    "value": value,
                    "cut_off": answer.cut_off,
                    "metric": sample.metric,
                }
