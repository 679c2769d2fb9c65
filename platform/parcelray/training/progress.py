"""The progress of a training, and how the console shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_LINES = 10
"""Lines that a console without a cursor (a log file) gets."""


class Progress(NamedTuple):
    """What a progress bar shows."""

    step: int
    num_steps: int
    loss: float
    budget: int
    tokens_per_second: float


@contextmanager
def progress_bar(console: Console, title: str, num_steps: int) -> Iterator[Callable[[Progress], None]]:
    """Shows loss, budget, tokens/s and time left: a bar on a terminal, a few lines elsewhere."""
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
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(title, total=num_steps, state="starting")
        yield lambda progress: bar.update(task, completed=progress.step, state=_describe(progress))


def _line_writer(console: Console, title: str, num_steps: int) -> Callable[[Progress], None]:
    shown = 0

    def write(progress: Progress) -> None:
        nonlocal shown
        part = progress.step * _LINES // num_steps
        if part > shown:
            shown = part
            console.print(f"{title}: step {progress.step}/{num_steps}, {_describe(progress)}")

    return write


def _describe(progress: Progress) -> str:
    return f"loss {progress.loss:.3f}, {progress.budget} visual tokens, {progress.tokens_per_second:,.0f} tokens/s"
