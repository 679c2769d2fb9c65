"""Runs functions next to each other, each in a Ray worker of its own."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import ray

T = TypeVar("T")


def run_in_workers(tasks: Mapping[str, Callable[[], T]], *, at_once: int) -> Iterator[tuple[str, T]]:
    """Runs functions in workers of the Ray instance that this process is connected to.

    Args:
        tasks: picklable functions by name; they start in this order.
        at_once: number of functions that run at the same time.

    Yields:
        Name and result of each function, in the order in which they end.

    Raises:
        Exception: what a function raised; the functions that are still running are stopped.
    """
    cpus: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    # A failed function is not run again: its error is not one of the machine.
    call: Any = ray.remote(num_cpus=max(1, int(cpus["CPU"]) // at_once), max_retries=0)(_call)
    pending: dict[Any, str] = {call.remote(task): name for name, task in tasks.items()}
    try:
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            yield pending.pop(done), _result(done)
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _call(task: Callable[[], T]) -> T:
    return task()


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
