"""Presents a finished evaluation: console tables, Markdown, CSV, a plot, one row per prediction, MLflow metrics."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from parcelray.config.evaluate import budget_name
from parcelray.evaluation.scoring.aggregate import unevaluated
from parcelray.evaluation.scoring.estimate import Estimate
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.evaluation.scoring.summary import Summary
from parcelray.files import write_json
from parcelray.tracking.mlflow_tracker import MlflowRunLogger

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CSV_COLUMNS = (
    "split", "family", "metric", "num_visual_tokens", "score", "std_error", "low", "high", "n", "unscored", "unparsed",
    "empty", "cut_off", "mean_new_tokens", "retention", "retention_low", "retention_high",
)  # fmt: skip
_MAX_LINES = 12
"""Largest number of splits that the plot shows one by one; with more, it shows families."""


def write_results(summary: Summary, folder: Path) -> list[Path]:
    """Writes the tables, one row per prediction, and the plot into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"result.csv": _csv(summary), "result.md": _markdown(summary)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_json(folder / "result.json", summary.to_dict())
    pq.write_table(pa.Table.from_pylist(list(_prediction_rows(summary))), folder / "samples.parquet")
    plot_evaluation(summary, folder / "result.png")
    return [folder / name for name in ("result.json", *files, "samples.parquet", "result.png")]


def show(summary: Summary, console: Console) -> None:
    """Prints the tables and the notes."""
    for table in _tables(summary):
        console.print(table)
    for note in notes(summary):
        console.print(f"Note: {note}.")


def record_results(uri: str, run_id: str, summary: Summary, files: Sequence[Path]) -> None:
    """Logs the metrics `<split>/<metric>` with the budget as the step, so that MLflow plots them over the budget."""
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


def notes(summary: Summary) -> list[str]:
    """Returns notes on limits of the scores, to be read before they are compared with others."""
    found = []
    lost = unevaluated(summary.splits)
    if lost:
        found.append(
            f"{lost} samples could not be evaluated; they are in no score, and result.json lists them with the reason"
        )
    partial = [split.name for split in summary.splits if not split.additive and not split.rules.whole]
    if partial:
        found.append(
            f"{', '.join(partial)}: scored on a part of the split, where this metric cannot be compared with other"
            " scores"
        )
    for benchmark in summary.evaluation.benchmarks:
        expected, rows = getattr(benchmark.config.source, "rows", None), benchmark.fingerprint.rows
        if expected is not None and expected != rows:
            found.append(
                f"{benchmark.config.name}: the data have {rows} rows, but {expected} are expected; do not compare these"
                " scores with published ones"
            )
        if benchmark.config.unscorable is not None:
            found.append(f"{benchmark.config.name} is not scored: {benchmark.config.unscorable}")
    sensitive = summary.sensitive()
    if sensitive:
        smallest = min(budget for budget in summary.budgets if budget)
        found.append(f"most sensitive to compression (largest loss at {smallest} tokens): {', '.join(sensitive)}")
    return found


def _tables(summary: Summary) -> Iterator[Table]:
    """The tables of scores, retention, sub-scores, and irregular answers, for the console."""
    yield _rich("Scores [95 %], on the scale of the papers", _score_rows(summary))
    yield _rich(
        f"Retention in percent of {_short(summary.reference)} at {summary.reference_budget} visual tokens [95 %]",
        _retention_rows(summary),
    )
    if len(_sub_score_rows(summary)) > 1:
        yield _rich("Sub-scores", _sub_score_rows(summary))
    yield _rich("Budgets and answers", _answer_rows(summary))


def _markdown(summary: Summary) -> str:
    """The tables of `_tables` and the notes as Markdown."""
    parts = [f"# {summary.evaluation.name}: {summary.evaluation.model}"]
    for title, rows in (
        ("Scores [95 %]", _score_rows(summary)),
        (
            f"Retention in percent of {summary.reference} at {summary.reference_budget} visual tokens [95 %]",
            _retention_rows(summary),
        ),
        ("Sub-scores", _sub_score_rows(summary)),
        ("Budgets and answers", _answer_rows(summary)),
    ):
        if len(rows) == 1:
            continue
        header, *body = rows
        lines = [header, ["---"] * len(header), *body]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts.append("\n".join(f"- {note}" for note in notes(summary)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _csv(summary: Summary) -> str:
    """The scores as CSV, one row per split and budget."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for split in summary.splits:
        for budget, score in split.scores.items():
            interval = score.estimate.interval
            kept = summary.retention[budget].get(split.name)
            retention = kept.interval[:3] if kept is not None else ("", "", "")
            counts = (interval.n, score.unscored, score.unparsed, score.empty, score.cut_off, score.mean_new_tokens)
            numbers = (interval.value, score.estimate.std_error, interval.low, interval.high)
            writer.writerow((split.name, split.family, split.metric, budget, *numbers, *counts, *retention))
    return buffer.getvalue()


def _prediction_rows(summary: Summary) -> Iterator[dict[str, Any]]:
    """One row per sample and budget."""
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


def _score_rows(summary: Summary) -> list[list[str]]:
    rows = [["split", "metric", "chance", *(budget_name(budget) for budget in summary.budgets), "n"]]
    for split in summary.splits:
        scores = [_percent(split.scores[budget].estimate) for budget in summary.budgets]
        by_chance = summary.chance[split.name]
        shown = "-" if by_chance is None else f"{by_chance.value:.1f}"
        count = str(max(score.estimate.n for score in split.scores.values()))
        rows.append([split.name, split.metric, shown, *scores, count])
    for family, names in summary.families.items():
        if len(summary.families) > 1 and len(names) > 1:
            rows.append(
                [
                    f"mean of {family}",
                    "",
                    "",
                    *(_percent(summary.mean_score(budget, names)) for budget in summary.budgets),
                    "",
                ]
            )
    if len(summary.splits) > 1:
        rows.append(["mean of all", "", "", *(_percent(summary.mean_score(budget)) for budget in summary.budgets), ""])
    return rows


def _retention_rows(summary: Summary) -> list[list[str]]:
    rows = [["split", *(budget_name(budget) for budget in summary.budgets)]]
    for split in summary.splits:
        kept = [summary.retention[budget].get(split.name) for budget in summary.budgets]
        rows.append([split.name, *(_percent(each) if each is not None else "-" for each in kept)])
    for family, names in summary.families.items():
        if len(summary.families) > 1 and len(names) > 1:
            rows.append(
                [f"mean of {family}", *(_percent(summary.mean_retention(budget, names)) for budget in summary.budgets)]
            )
    if len(summary.splits) > 1:
        rows.append(["mean of all", *(_percent(summary.mean_retention(budget)) for budget in summary.budgets)])
    return rows


def _sub_score_rows(summary: Summary) -> list[list[str]]:
    """Sub-scores such as consistency, yes-ratio and box accuracy; result.json also has those of single categories."""
    rows = [["split", "sub-score", *(budget_name(budget) for budget in summary.budgets)]]
    for split in summary.splits:
        headline, *others = next(iter(split.scores.values())).totals
        for name in others:
            if "/" not in name and name != headline:
                rows.append(
                    [split.name, name, *(f"{split.scores[budget].totals[name]:.1f}" for budget in summary.budgets)]
                )
    return rows


def _answer_rows(summary: Summary) -> list[list[str]]:
    head = [
        "split",
        f"needed budget (within {summary.need_within:g} %)",
        "oracle: score at mean tokens",
        "unscored",
        "unparsed",
        "empty",
        "cut off",
        "tokens per answer",
    ]
    return [head, *(_answer_row(summary, split) for split in summary.splits)]


def _answer_row(summary: Summary, split: SplitScores) -> list[str]:
    needed, oracle = summary.needed(split), summary.oracle(split)
    scores = [split.scores[budget] for budget in summary.budgets]

    def span(values: list[int]) -> str:
        return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"

    return [
        split.name,
        "-" if needed is None else budget_name(needed),
        f"{oracle[-1].score:.1f} at {oracle[-1].mean_tokens:.0f}" if oracle else "-",
        span([score.unscored for score in scores]),
        span([score.unparsed for score in scores]),
        span([score.empty for score in scores]),
        span([score.cut_off for score in scores]),
        f"{sum(score.mean_new_tokens for score in scores) / len(scores):.1f}",
    ]


def _rich(title: str, rows: list[list[str]]) -> Table:
    head, *body = rows
    table = Table(Column(head[0], no_wrap=True), *(Column(name, justify="right") for name in head[1:]), title=title)
    for row in body:
        table.add_row(*map(escape, row))
    return table


def _percent(estimate: Estimate) -> str:
    interval = estimate.interval
    if math.isnan(interval.value):
        return "-"
    return f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def _short(model: str) -> str:
    return model[: len("sha256:") + 8] if model.startswith("sha256:") else model


def plot_evaluation(summary: Summary, path: Path) -> None:
    """Plots score and retention against visual tokens per image: one line per split or per family, and the mean.

    Args:
        summary: the evaluation.
        path: PNG to write.
    """
    # Imported here, so that processes that only evaluate do not load matplotlib.
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    from parcelray.plotting import new_figure

    figure = new_figure(12, 5)
    left, right = figure.subplots(1, 2)
    lines = (
        {split.name: [split.name] for split in summary.splits}
        if len(summary.splits) <= _MAX_LINES
        else summary.families
    )
    for number, (name, members) in enumerate(lines.items()):
        _line(left, summary, [summary.mean_score(budget, members).interval for budget in summary.budgets], name, number)
        _line(
            right,
            summary,
            [summary.mean_retention(budget, members).interval for budget in summary.budgets],
            None,
            number,
        )
    if len(summary.splits) > 1:
        _line(
            right,
            summary,
            [summary.mean_retention(budget).interval for budget in summary.budgets],
            "mean of all splits",
            None,
        )
    right.axhline(100, color="black", linewidth=0.8, linestyle=":")
    for axes, title in ((left, "score, on the scale of the papers"), (right, "retention (% of the reference)")):
        axes.xaxis.set_major_locator(FixedLocator(list(range(len(summary.budgets)))))
        axes.xaxis.set_major_formatter(FixedFormatter([budget_name(budget) for budget in summary.budgets]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("visual tokens per image")
        axes.set_ylabel(f"{title}, 95 % intervals")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(summary.evaluation.name)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _line(axes: "Axes", summary: Summary, intervals: list[Interval], label: str | None, number: int | None) -> None:
    """Draws one line with error bars; the line without a number is the mean of all."""
    from parcelray.plotting import COLORS, MARKERS

    positions = [position + (0.02 * (number or 0) - 0.1) for position in range(len(summary.budgets))]
    errors = [
        [max(0.0, interval.value - interval.low) for interval in intervals],
        [max(0.0, interval.high - interval.value) for interval in intervals],
    ]
    style: dict[str, Any] = (
        {"color": "black", "linewidth": 2.4}
        if number is None
        else {"color": COLORS[number % len(COLORS)], "linewidth": 1.4}
    )
    marker = "o" if number is None else MARKERS[number // len(COLORS) % len(MARKERS)]
    axes.errorbar(
        positions,
        [interval.value for interval in intervals],
        yerr=errors,
        label=label,
        marker=marker,
        capsize=2,
        **style,
    )
