"""Where the workers of a training leave their progress for the driver.

Its process loads neither torch nor transformers, which take it seconds.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from parcelray.training.progress import Progress

_POLL_S = 0.5


@ray.remote(num_cpus=0)
class _ProgressBoard:
    """Holds rank 0's newest progress for the driver; workers and driver may be on different nodes."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def update(self, progress: Progress) -> None:
        self._progress = progress

    def latest(self) -> Progress | None:
        return self._progress


@contextmanager
def progress_board(on_progress: Callable[[Progress], None]) -> Iterator[Any]:
    """The handle of a board, on which workers call `update.remote(progress)`; `on_progress` is called in this process, about twice a second."""
    board = _ProgressBoard.remote()  # type: ignore[attr-defined]
    stop = threading.Event()

    def poll() -> None:
        shown = None
        while not stop.wait(_POLL_S):
            latest = ray.get(board.latest.remote())
            if latest is not None and latest != shown:
                shown = latest
                on_progress(latest)

    thread = threading.Thread(target=poll, name="parcelray-progress", daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join()
        ray.kill(board)
