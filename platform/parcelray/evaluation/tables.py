"""An evaluation as tables: for the console, in Markdown and as CSV."""

import csv
import io
import math
from collections.abc import Iterator

from rich.table import Column, Table

from parcelray.evaluation.scoring.aggregate import unasked
from parcelray.evaluation.scoring.paired import Comparison
from parcelray.evaluation.scoring.split_scores import Estimate, SplitScores
from parcelray.evaluation.scoring.summary import Summary

_CSV_COLUMNS = (
    "split", "family", "metric", "num_visual_tokens", "score", "std_error", "low", "high", "n", "unscored", "unparsed", "empty", "cut_off",
    "mean_new_tokens", "retention", "retention_low", "retention_high",
)  # fmt: skip


def evaluation_tables(summary: Summary) -> Iterator[Table]:
    """Scores, retention, and what was odd about the answers."""
    yield _rich("Scores [95 %], on the scale of the papers", _score_rows(summary))
    yield _rich(
        f"Retention in percent of {_short(summary.reference)} at {summary.reference_budget} visual tokens [95 %]",
        _retention_rows(summary),
    )
    if len(_sub_score_rows(summary)) > 1:
        yield _rich("Sub-scores", _sub_score_rows(summary))
    yield _rich("Budgets and answers", _answer_rows(summary))


def evaluation_markdown(summary: Summary) -> str:
    """The same as Markdown."""
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


def evaluation_csv(summary: Summary) -> str:
    """One row per split and budget."""
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


def notes(summary: Summary) -> list[str]:
    """What a reader must know before comparing these numbers."""
    found = []
    lost = unasked(summary.splits)
    if lost:
        found.append(
            f"{lost} questions could not be asked; they are in no score, and result.json names them with the reason"
        )
    partial = [split.name for split in summary.splits if not split.additive and not split.rules.whole]
    if partial:
        found.append(
            f"{', '.join(partial)}: scored on a part of the split, where this metric means nothing beside other numbers"
        )
    for benchmark in summary.evaluation.benchmarks:
        expected, rows = getattr(benchmark.config.source, "rows", None), benchmark.asked.pin.rows
        if expected is not None and expected != rows:
            found.append(
                f"{benchmark.config.name}: the data have {rows} rows where {expected} are expected; these are not the"
                " numbers of the papers"
            )
        if benchmark.config.unscorable is not None:
            found.append(f"{benchmark.config.name} is not scored: {benchmark.config.unscorable}")
    sensitive = summary.sensitive()
    if sensitive:
        smallest = min(budget for budget in summary.budgets if budget)
        found.append(f"most sensitive to compression (largest loss at {smallest} tokens): {', '.join(sensitive)}")
    return found


def comparison_table(comparisons: list[Comparison], first: str, second: str) -> Table:
    """One row per split: both scores, the paired difference and its tests."""
    table = Table(
        Column("split", no_wrap=True),
        "metric",
        first,
        second,
        "difference [95 %]",
        "p (bootstrap)",
        "only first / second right",
        "p (McNemar)",
        "n",
    )
    for each in comparisons:
        gap, test = each.difference, each.mcnemar
        table.add_row(
            each.split,
            each.metric,
            f"{each.first.value:.1f}",
            f"{each.second.value:.1f}",
            f"{gap.value:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]",
            _p_value(each.p_value),
            f"{test.only_first} / {test.only_second}" if test is not None else "-",
            _p_value(test.p_value) if test is not None else "-",
            str(each.n),
        )
    return table


def budget_name(budget: int) -> str:
    """A column's head."""
    return str(budget) if budget else "blind"


def _score_rows(summary: Summary) -> list[list[str]]:
    rows = [["split", "metric", *(budget_name(budget) for budget in summary.budgets), "n"]]
    for split in summary.splits:
        scores = [_percent(split.scores[budget].estimate) for budget in summary.budgets]
        rows.append([split.name, split.metric, *scores, str(max(score.estimate.n for score in split.scores.values()))])
    for family, names in summary.families.items():
        if len(summary.families) > 1 and len(names) > 1:
            rows.append(
                [
                    f"mean of {family}",
                    "",
                    *(_percent(summary.mean_score(budget, names)) for budget in summary.budgets),
                    "",
                ]
            )
    if len(summary.splits) > 1:
        rows.append(["mean of all", "", *(_percent(summary.mean_score(budget)) for budget in summary.budgets), ""])
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
    """Consistency, yes-ratio, box accuracy and the like; those of single categories are in result.json."""
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
        f"needs (within {summary.need_within:g} %)",
        "oracle: score at mean tokens",
        "unscored",
        "unparsed",
        "empty",
        "cut off",
        "tokens an answer",
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
        table.add_row(*row)
    return table


def _percent(estimate: Estimate) -> str:
    interval = estimate.interval
    if math.isnan(interval.value):
        return "-"
    return f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def _p_value(value: float) -> str:
    return "-" if math.isnan(value) else ("< 0.001" if value < 0.001 else f"{value:.3f}")


def _short(model: str) -> str:
    return model[: len("sha256:") + 8] if model.startswith("sha256:") else model
