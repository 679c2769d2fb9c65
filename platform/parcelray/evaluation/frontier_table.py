"""The frontier as a table."""

from rich.table import Column, Table

from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint
from parcelray.evaluation.scoring.intervals import Interval


def frontier_table(frontier: Frontier) -> Table:
    """One row per method and budget: overall score, retention and family scores, in percent with 95 % intervals."""
    families = _families(frontier)
    fixed = (Column("method", no_wrap=True), Column("tokens", no_wrap=True, justify="right"))
    table = Table(*fixed, "score [95 %]", "retention [95 %]", *families, title=_title(frontier))
    for point in frontier.points:
        table.add_row(*_cells(point, families))
    return table


def frontier_markdown(frontier: Frontier) -> str:
    """The same rows as a Markdown table."""
    families = _families(frontier)
    lines = [["method", "tokens", "score [95 %]", "retention [95 %]", *families], ["---"] * (4 + len(families))]
    lines += [_cells(point, families) for point in frontier.points]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _title(frontier: Frontier) -> str:
    unscored = sum(point.unscored for point in frontier.points)
    retention = f"; retention against {frontier.reference}" if frontier.reference is not None else ""
    return f"Scores in percent{retention}" + (f"; {unscored} answers could not be scored" if unscored else "")


def _families(frontier: Frontier) -> list[str]:
    return list(dict.fromkeys(family for point in frontier.points for family in point.families))


def _cells(point: FrontierPoint, families: list[str]) -> list[str]:
    tokens = str(point.num_visual_tokens) if point.num_visual_tokens else "-"
    retention = _percent(point.retention) if point.retention is not None else "-"
    return [
        point.method,
        tokens,
        _percent(point.overall),
        retention,
        *(_percent(point.families[family]) if family in point.families else "-" for family in families),
    ]


def _percent(interval: Interval) -> str:
    return f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"
