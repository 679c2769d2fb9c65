"""What trials take of a cluster: how many it holds at the same time, and whether any of them computes."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import ray

from parcelray.errors import SystemFailure, UserError


@dataclass(frozen=True)
class TrialResources:
    """What a trial takes of the cluster: the actor itself, and the workers that it starts, which Tune does not reserve."""

    cpus: float
    gpus: float = 0.0
    workers: int = 0
    worker_cpus: float = 0.0
    """Of each worker."""
    worker_gpus: float = 0.0
    helper_cpus: float = 0.0
    """Of the tasks that read for the workers, all together."""

    def concurrency(self, nodes: Sequence[Mapping[str, float]], wanted: int | None) -> int:
        """How many trials the cluster holds at the same time.

        With more, trials that start workers would wait for each other for ever (ray#54305).

        Args:
            nodes: resources of each node.
            wanted: at most so many; None: as many as it holds.

        Raises:
            UserError: it cannot hold one.
        """
        needs = _amounts(
            self.cpus + self.workers * self.worker_cpus + self.helper_cpus, self.gpus + self.workers * self.worker_gpus
        )
        total = {name: sum(node.get(name, 0.0) for node in nodes) for name in needs}
        holds = _times(total, needs)
        if holds < 1:
            raise UserError(
                f"A trial needs {_listed(needs, needs)}, but the Ray cluster has {_listed(total, needs)} in all; "
                "give the trials fewer workers, or use a larger cluster."
            )
        # What has to be on one node: a worker, or the trial itself.
        unit = _amounts(self.worker_cpus, self.worker_gpus) if self.workers else needs
        places = sum(_times(node, unit) for node in nodes)
        if places < max(1, self.workers):
            name = f"A trial has {self.workers} workers, each of which" if self.workers else "A trial"
            raise UserError(
                f"{name} needs {_listed(unit, unit)} on one node, but the Ray cluster's nodes"
                f" ({'; '.join(_listed(node, unit) for node in nodes)}) have room for {places}; ask for less a worker,"
                " or use larger nodes."
            )
        holds = min(holds, places // max(1, self.workers))
        return holds if wanted is None else min(holds, wanted)


def cluster_nodes() -> list[Mapping[str, float]]:
    """Resources of each node of the Ray instance that this process is connected to."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _amounts(cpus: float, gpus: float) -> dict[str, float]:
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0}


def _times(there: Mapping[str, float], needs: Mapping[str, float]) -> int:
    # A small share more than the sum of the shares must not count as one less.
    return min((int(there.get(name, 0.0) / need + 1e-9) for name, need in needs.items()), default=0)


def _listed(amounts: Mapping[str, float], names: Iterable[str]) -> str:
    return " and ".join(f"{amounts.get(name, 0.0):g} {name}" for name in names)


class Watchdog:
    """Ends a search in which nothing computes, and says why.

    A trial that trains runs as soon as its driver does, which takes next to nothing; its workers may wait for ever all
    the same (ray#54305).

    Args:
        resources: of a trial.
        stall_s: longest time in which nothing computes.
        clock: time in seconds.
    """

    def __init__(self, resources: TrialResources, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._resources = resources
        self._stall_s = stall_s
        self._clock = clock
        self._busy_at = clock()
        self._looked_at = -stall_s

    def feed(self) -> None:
        """A trial has started, reported or ended."""
        self._busy_at = self._clock()

    def look(self, running: int, waiting: int) -> None:
        """Looks at the trials.

        Args:
            running: trials whose own process runs.
            waiting: trials whose process waits.

        Raises:
            SystemFailure: nothing has computed for `stall_s`.
        """
        now = self._clock()
        if running and self._resources.workers:
            # A question to Ray's head node, too slow for every step of Tune's loop.
            if now - self._looked_at >= min(5.0, self._stall_s / 4):
                self._looked_at = now
                if _has_worker_group(self._resources):
                    self._busy_at = now
        elif running or not waiting:
            self._busy_at = now
        if now - self._busy_at > self._stall_s:
            raise SystemFailure(self._reason(running, waiting))

    def _reason(self, running: int, waiting: int) -> str:
        own = self._resources
        if running:
            asked = f"{own.workers} workers of {_listed(each := _amounts(own.worker_cpus, own.worker_gpus), each)}"
            what = (
                f"{running} trials run, but for {self._stall_s:g} s none of them has got its workers: each asks for"
                f" {asked}"
            )
        else:
            asked = _listed(each := _amounts(own.cpus, own.gpus), each)
            what = f"{waiting} trials have waited for {self._stall_s:g} s and none runs: each asks for {asked}"
        names = ("CPU", "GPU") if own.gpus or own.worker_gpus else ("CPU",)
        total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
        return (
            f"{what}, and of the cluster's {_listed(total, names)} are free {_listed(free, names)}. End what else runs"
            " there, or raise stall_s; the same command with --resume goes on."
        )


def _has_worker_group(resources: TrialResources) -> bool:
    """Whether Ray Train has placed the workers of any training of this driver; Tune's own groups hold the trials' processes."""
    job = ray.get_runtime_context().get_job_id()
    process = [_amounts(resources.cpus, resources.gpus)]
    groups = ray.util.placement_group_table()
    return any(
        # The last digits of a group's id are those of the driver that made it.
        group["state"] == "CREATED" and identifier.endswith(job) and list(group["bundles"].values()) != process
        for identifier, group in groups.items()
    )
