"""The console that commands and pipelines write to."""

from rich.console import Console

_LOG_WIDTH = 160
"""Columns of a console that is no terminal (a file, a pipe, a job's log): wide enough that no table is folded."""


def open_console(*, stderr: bool = False) -> Console:
    """Open a console on standard output or standard error that does not colour numbers and paths by itself."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_LOG_WIDTH)
