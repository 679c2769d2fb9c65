"""The progress of an evaluation on the console."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 5
"""Lines of progress that a console without a cursor gets for each benchmark."""


@contextmanager
def progress_bars(console: Console, totals: Mapping[str, int]) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each benchmark with rows/s and the time left; a few lines where there is no terminal."""
    if not console.is_terminal:
        yield _line_writer(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bars = {name: progress.add_task(name, total=total, speed="") for name, total in totals.items()}

        def show_rows(name: str, rows: int, total: int) -> None:
            speed = progress.tasks[bars[name]].speed
            progress.update(bars[name], completed=rows, total=total, speed=f"{speed:.1f} rows/s" if speed else "")

        yield show_rows


def _line_writer(console: Console) -> Callable[[str, int, int], None]:
    shown: dict[str, int] = {}
    began = time.monotonic()

    def write(name: str, rows: int, total: int) -> None:
        part = rows * _LINES // total
        if part > shown.get(name, 0):
            shown[name] = part
            speed = rows / max(time.monotonic() - began, 1e-9)
            console.print(
                f"{name}: {rows} of {total} rows, {speed:.1f} rows/s, about {(total - rows) / speed:.0f} s left",
            )

    return write
