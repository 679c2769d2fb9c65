"""Cluster resources of trials: how many trials run at the same time, and a watchdog for a stalled search."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import ray

from parcelray.cluster.capacity import Capacity, Need, Part
from parcelray.errors import SystemFailure


@dataclass(frozen=True)
class TrialResources:
    """Resources of one trial: its own actor, and the workers that it starts, which Tune does not reserve."""

    cpus: float
    """CPUs of the trial's own process."""
    gpus: float = 0.0
    """GPUs of the trial's own process."""
    workers: int = 0
    """Number of workers that the trial starts."""
    worker_cpus: float = 0.0
    """CPUs of each worker."""
    worker_gpus: float = 0.0
    """GPUs of each worker."""
    helper_cpus: float = 0.0
    """CPUs of all tasks together that read data for the workers."""

    @property
    def need(self) -> Need:
        """The resources of one trial for the comparison with a cluster."""
        helpers = math.ceil(self.helper_cpus)
        return Need(
            "A trial",
            (
                Part(1, "process", {"CPU": self.cpus, "GPU": self.gpus}),
                Part(self.workers, "worker", {"CPU": self.worker_cpus, "GPU": self.worker_gpus}),
                Part(helpers, "data task", {"CPU": self.helper_cpus / max(1, helpers)}),
            ),
            "give the trials fewer workers or fewer resources",
        )

    def concurrency(self, capacity: Capacity, wanted: int | None) -> int:
        """Returns how many trials the cluster can run at the same time.

        With more, trials that start workers would wait for each other forever (ray#54305).

        Args:
            capacity: the cluster.
            wanted: upper limit; None: no limit.

        Raises:
            UserError: the cluster cannot run a single trial.
        """
        capacity.check(self.need)
        return capacity.room_for(self.need, sys.maxsize if wanted is None else wanted)


def _amounts(cpus: float, gpus: float) -> dict[str, float]:
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0}


def _listed(amounts: Mapping[str, float], names: Iterable[str]) -> str:
    return " and ".join(f"{amounts.get(name, 0.0):g} {name}" for name in names)


class Watchdog:
    """Ends a search in which nothing computes, with an error that gives the reason.

    The driver of a training trial takes almost no resources, so it always starts. Its workers may nevertheless wait
    forever (ray#54305).

    Args:
        resources: resources of a trial.
        stall_s: longest time in which nothing computes, seconds.
        clock: returns the time in seconds.
    """

    def __init__(self, resources: TrialResources, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._resources = resources
        self._stall_s = stall_s
        self._clock = clock
        self._active_at = clock()
        self._checked_at = -stall_s

    def reset(self) -> None:
        """Restarts the time limit, because a trial has started, reported or ended."""
        self._active_at = self._clock()

    def check(self, running: int, waiting: int) -> None:
        """Checks whether anything computes.

        Args:
            running: number of trials whose own process is running.
            waiting: number of trials whose own process waits for resources.

        Raises:
            SystemFailure: nothing has computed for `stall_s` seconds.
        """
        now = self._clock()
        if running and self._resources.workers:
            # This queries Ray's head node, which is too slow for every step of Tune's loop.
            if now - self._checked_at >= min(5.0, self._stall_s / 4):
                self._checked_at = now
                if _has_worker_group(self._resources):
                    self._active_at = now
        elif running or not waiting:
            self._active_at = now
        if now - self._active_at > self._stall_s:
            raise SystemFailure(self._reason(running, waiting))

    def _reason(self, running: int, waiting: int) -> str:
        own = self._resources
        if running:
            amounts = _amounts(own.worker_cpus, own.worker_gpus)
            problem = (
                f"{running} trials are running, but none of them got its workers for {self._stall_s:g} s: each requests"
                f" {own.workers} workers of {_listed(amounts, amounts)}"
            )
        else:
            amounts = _amounts(own.cpus, own.gpus)
            problem = (
                f"{waiting} trials have waited for {self._stall_s:g} s and none is running: each requests"
                f" {_listed(amounts, amounts)}"
            )
        names = ("CPU", "GPU") if own.gpus or own.worker_gpus else ("CPU",)
        total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
        return (
            f"{problem}; the cluster has {_listed(total, names)}, of which {_listed(free, names)} are free. Stop other"
            " programs on the cluster, or raise stall_s; then re-run the same command with --resume."
        )


def _has_worker_group(resources: TrialResources) -> bool:
    """Whether Ray Train has placed the workers of any training of this driver.

    The placement groups of Tune itself hold the trials' own processes and do not count.
    """
    job = ray.get_runtime_context().get_job_id()
    process = [_amounts(resources.cpus, resources.gpus)]
    groups = ray.util.placement_group_table()
    return any(
        # The last digits of a group's id are those of the driver that made it.
        group["state"] == "CREATED" and identifier.endswith(job) and list(group["bundles"].values()) != process
        for identifier, group in groups.items()
    )
