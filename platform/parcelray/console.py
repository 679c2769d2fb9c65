"""The console that commands and pipelines write to: tables, numbers with intervals and progress in one style."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_LOG_WIDTH = 160
"""Columns of a console that is not a terminal (a file, a pipe, a job's log): wide enough that no table is folded."""
_PROGRESS_LINES = 10
"""Number of progress lines that a console that is not a terminal gets."""


def open_console(*, stderr: bool = False) -> Console:
    """Open a console on standard output or standard error that does not colour numbers and paths by itself."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_LOG_WIDTH)


def key_value_table(rows: Mapping[str, object], *, header: tuple[str, str], title: str | None = None) -> Table:
    """A table of two columns: one row for each key and its value."""
    table = Table(*header, title=title)
    for key, value in rows.items():
        table.add_row(key, str(value))
    return table


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float, low: float, high: float) -> str:
    """A percentage with its confidence interval, such as `61.5 % [58.1, 64.8]`; all arguments are in percent."""
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


@contextmanager
def step_progress(console: Console, title: str, num_steps: int) -> Iterator[Callable[[int, str], None]]:
    """Show the progress of `num_steps` steps: a bar with the time left on a terminal, a few lines elsewhere.

    Yields:
        A function that shows the number of finished steps and a short text on the current state.
    """
    if not console.is_terminal:
        yield _line_writer(console, title, num_steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=num_steps, state="starting")
        yield lambda step, state: bar.update(task, completed=step, state=state)


def _line_writer(console: Console, title: str, num_steps: int) -> Callable[[int, str], None]:
    lines = 0

    def write(step: int, state: str) -> None:
        nonlocal lines
        if not step:
            # Before the first step, such as the download of a model.
            console.print(f"{title}: {state}", markup=False)
        due = step * _PROGRESS_LINES // num_steps
        if due > lines:
            lines = due
            console.print(f"{title}: step {step}/{num_steps}, {state}")

    return write
