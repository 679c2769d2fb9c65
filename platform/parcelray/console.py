"""The console that commands and pipelines write to."""

from rich.console import Console

_LOG_WIDTH = 160
"""Columns of a console that is no terminal (a file, a pipe, a job's log): wide enough that no table is folded."""


def open_console(*, stderr: bool = False) -> Console:
    """A console on standard output or standard error."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_LOG_WIDTH)
