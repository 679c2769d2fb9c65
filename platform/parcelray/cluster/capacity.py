"""Capacity of a Ray cluster: what its nodes hold now, what its autoscaler may add, and a wait for both.

Ray itself waits forever, without a message, for resources that it does not have. A job therefore states its needs
before it starts: a need that the cluster can never meet is refused at once, and any other is waited for.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ray
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.placement_group import placement_group, remove_placement_group

from parcelray.errors import SystemFailure, UserError

Amounts = Mapping[str, float]
"""Amounts by Ray's resource names, such as `{"CPU": 1.0, "GPU": 1.0}`."""

DATA_TASK_CPUS = 0.5
"""CPUs that a task of Ray Data reserves while it reads rows."""
_HEAD = "node:__internal_head__"
"""Resource that only the head node has."""
_FIRST_WAIT_S = 2.0
"""Wait without a message, seconds: resources of a job that has just ended become free within it."""
_POLL_S = 1.0
_HEAD_TASK_LIMIT_S = 60.0
_UNITS = 10_000
"""Units per CPU or GPU. Ray computes with this precision, too, so that sums of fractional shares are exact."""


class Part(NamedTuple):
    """Equal processes of a job, each of which must fit on one node."""

    number: int
    name: str
    """Name of one process in messages, such as `worker`."""
    each: Amounts
    """Resources of each process."""


@dataclass(frozen=True)
class Need:
    """Resources that a job needs at the same time."""

    subject: str
    """What needs the resources, as the subject of a sentence, such as `The training`."""
    parts: tuple[Part, ...]
    remedy: str
    """What the user can change so that less is needed, such as `lower scaling.num_workers`."""

    def __str__(self) -> str:
        return " and ".join(
            f"{number} {name}{'s' if number > 1 else ''} of {_listed(each)}{' each' if number > 1 else ''}"
            for number, name, each in self.parts
            if number and _names(each)
        )

    def times(self, number: int) -> "Need":
        """Returns the need of `number` such jobs together."""
        parts = tuple(part._replace(number=number * part.number) for part in self.parts)
        return Need(self.subject, parts, self.remedy)

    @property
    def bundles(self) -> list[Amounts]:
        """The resources of every process, the largest first; processes that need none are left out."""
        bundles = [dict(part.each) for part in self.parts for _ in range(part.number) if _names(part.each)]
        return sorted(bundles, key=lambda each: (-each.get("GPU", 0.0), -each.get("CPU", 0.0)))


class NodeType(NamedTuple):
    """A kind of node that the autoscaler can start."""

    name: str
    resources: Amounts
    most: int
    """Largest number of nodes of this type."""


@dataclass(frozen=True)
class Capacity:
    """What a cluster holds, and what its autoscaler may add."""

    nodes: tuple[Amounts, ...]
    """Total resources of each live node."""
    types: tuple[NodeType, ...] = ()
    """Node types of the autoscaler, without that of the head node; empty: the nodes do not change by themselves."""
    most: int = 0
    """Largest number of nodes of all types together."""
    is_known: bool = True
    """False if an autoscaler may exist whose node types cannot be read, so that no need can be refused."""

    def room_for(self, need: Need, limit: int) -> int:
        """Returns how many times a need fits, at most `limit`, once the autoscaler has added what it may.

        The processes are placed one after the other, the largest first, each on the first node with room for it. If the
        autoscaler's node types are not known, the result is at least 1.
        """
        now = _repetitions(_Room(self.nodes), need.bundles, limit)
        if not self.is_known:
            return max(1, now)
        head = [node for node in self.nodes if _HEAD in node]
        return max(now, _repetitions(_Room(head, self.types, self.most), need.bundles, limit))

    def check(self, need: Need) -> None:
        """Raises UserError, with both amounts, if the cluster can never hold a need."""
        if not self.room_for(need, 1):
            raise UserError(
                f"{need.subject} needs {need}, but the Ray cluster has only {self}; {need.remedy}, or use a larger"
                " cluster."
            )

    def __str__(self) -> str:
        if not self.types:
            nodes = Counter(_listed(node) for node in self.nodes)
            return " and ".join(f"{count} node{'s' if count > 1 else ''} of {each}" for each, count in nodes.items())
        head = [_listed(node) for node in self.nodes if _HEAD in node]
        kinds = [f"up to {kind.most} {kind.name} of {_listed(kind.resources)}" for kind in self.types]
        limit = f" ({self.most} nodes in all)" if self.most < sum(kind.most for kind in self.types) else ""
        return " and ".join([*(f"a head node of {each}" for each in head), *kinds]) + limit


def read_capacity() -> Capacity:
    """Reads the capacity of the cluster that this process is connected to, including its autoscaler's node types."""
    try:
        limits = ray.get(_autoscaler_limits.remote(), timeout=_HEAD_TASK_LIMIT_S)
    except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError):
        limits = None
    types, most = limits or ((), 0)
    # Nodes of a type without resources report what they detect when they start.
    is_known = limits is not None and all(kind.resources for kind in types)
    return Capacity(_live_nodes(), types, most, is_known)


def check_capacity(need: Need) -> None:
    """Refuses a need that the cluster can never hold.

    Raises:
        UserError: the cluster cannot hold the need, even with all nodes that its autoscaler may start.
    """
    # The node types of the autoscaler, which take a task on the head node, are read only if they matter.
    if not Capacity(_live_nodes()).room_for(need, 1):
        read_capacity().check(need)


def await_capacity(
    need: Need,
    wait_s: float,
    key: str,
    say: Callable[[str], object],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Waits until the cluster has free resources for a need. The request makes the autoscaler start nodes.

    The resources are released on return, and the caller requests them again: Ray Train, Tune, Data and Serve place
    their own processes.

    Args:
        need: the resources.
        wait_s: longest wait, seconds.
        key: key of the job file that sets `wait_s`, for the message.
        say: called with one sentence when the wait begins and whenever its reason changes.
        clock: returns the time in seconds.

    Raises:
        UserError: the cluster can never hold the need.
        SystemFailure: the resources were not free within `wait_s`.
    """
    check_capacity(need)
    bundles = need.bundles
    if not bundles:
        return
    deadline = clock() + wait_s
    group = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")
    said = None
    try:
        ready = group.wait(min(_FIRST_WAIT_S, wait_s))
        while not ready:
            reason = waiting_reason(need, *_cluster_status())
            if clock() >= deadline:
                raise SystemFailure(
                    f"{need.subject} did not get {need} within {wait_s:g} s: {reason}. Raise {key}, stop other programs"
                    f" on the cluster, or {need.remedy}; then run the same command again."
                )
            if reason != said:
                said = reason
                say(reason[0].upper() + reason[1:])
            ready = group.wait(_POLL_S)
    finally:
        remove_placement_group(group)


def waiting_reason(need: Need, status: ClusterStatus, starting: int) -> str:
    """Says what a need still lacks and what the autoscaler does about it, in the words of a message.

    Args:
        need: the resources that are waited for.
        status: state of the nodes.
        starting: number of nodes that the autoscaler is starting.
    """
    nodes = [*status.active_nodes, *status.idle_nodes]
    missing: Counter[str] = Counter()
    room = _Room([node.available_resources() for node in nodes])
    for bundle in need.bundles:
        if not room.place(bundle):
            missing.update({name: _integer(bundle[name]) for name in _names(bundle)})
    wanted = _listed({name: amount / _UNITS for name, amount in missing.items()}) if missing else str(need)
    text = f"waiting for {wanted}" + (f"; {starting} of {len(nodes) + starting} nodes starting" if starting else "")
    if status.failed_launches:
        last = max(status.failed_launches, key=lambda launch: launch.failed_ts_s or 0)
        text += f"; the last start of a {last.ray_node_type_name} failed ({' '.join(str(last.details).split())[:200]})"
    return text


def _cluster_status() -> tuple[ClusterStatus, int]:
    """Returns the state of the nodes, and the number of nodes that the autoscaler is starting.

    Only the second version of Ray's autoscaler, which `ray up` starts, reports them; with the first, it is 0.
    """
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return status, len(status.pending_nodes) + sum(launch.count for launch in status.pending_launches)


def _live_nodes() -> tuple[Amounts, ...]:
    return tuple(node["Resources"] for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]


@ray.remote(num_cpus=0, resources={_HEAD: 0.001})
def _autoscaler_limits() -> tuple[tuple[NodeType, ...], int] | None:
    """Reads the configuration of the autoscaler on the head node, as Ray has no interface for it.

    Returns:
        The result of `node_types`, which is empty if the cluster has no autoscaler; None if Ray's monitor, which
        contains the autoscaler, does not run on the head node (on Kubernetes, it runs in a container of its own).
    """
    address = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    option = "--autoscaling-config="
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if address in arguments and any(each.endswith("/monitor.py") for each in arguments):
            files = [each.removeprefix(option) for each in arguments if each.startswith(option)]
            return node_types(files[0]) if files else ((), 0)
    return None


def node_types(config_file: str) -> tuple[tuple[NodeType, ...], int]:
    """Returns an autoscaler's node types, without that of the head node, and the largest number of nodes of all types.

    Args:
        config_file: its configuration, in the format of `ray up`.
    """
    config = FileConfigReader(config_file).get_cached_autoscaling_config()
    kinds = (config.get_node_type_configs() or {}).values()
    types = tuple(
        NodeType(kind.name, dict(kind.resources), kind.max_worker_nodes)
        for kind in kinds
        if kind.name != config.get_head_node_type()
    )
    return types, config.get_max_num_worker_nodes() or 0


class _Room:
    """Free resources of nodes, and nodes that can still be started, while processes are placed on them."""

    def __init__(self, nodes: Iterable[Amounts], types: Sequence[NodeType] = (), most: int = 0) -> None:
        self._free = [_integers(node) for node in nodes]
        # Small nodes first, and nodes without GPUs before nodes with some.
        self._types = sorted(types, key=lambda kind: (kind.resources.get("GPU", 0), kind.resources.get("CPU", 0)))
        self._left = {kind.name: kind.most for kind in types}
        self._most = most

    def place(self, bundle: Amounts) -> bool:
        """Places one process; returns False if there is no room for it."""
        needed = _integers(bundle)
        for node in self._free:
            if _holds(node, needed):
                break
        else:
            started = self._start(needed)
            if started is None:
                return False
            node = started
        for name, amount in needed.items():
            node[name] -= amount
        return True

    def _start(self, needed: Mapping[str, int]) -> dict[str, int] | None:
        """Starts the smallest possible node that holds a process."""
        for kind in self._types:
            if self._most and self._left[kind.name] and _holds(_integers(kind.resources), needed):
                self._most -= 1
                self._left[kind.name] -= 1
                self._free.append(_integers(kind.resources))
                return self._free[-1]
        return None


def _repetitions(room: _Room, bundles: Sequence[Amounts], limit: int) -> int:
    return next((number for number in range(limit) if not all(map(room.place, bundles))), limit)


def _holds(free: Mapping[str, int], needed: Mapping[str, int]) -> bool:
    return all(free.get(name, 0) >= amount for name, amount in needed.items())


def _integers(amounts: Amounts) -> dict[str, int]:
    return {name: _integer(amounts[name]) for name in _names(amounts)}


def _integer(amount: float) -> int:
    return round(amount * _UNITS)


def _names(amounts: Amounts) -> list[str]:
    return [name for name in ("CPU", "GPU") if amounts.get(name, 0.0) > 0]


def _listed(amounts: Amounts) -> str:
    return " and ".join(f"{amounts[name]:g} {name}" for name in _names(amounts)) or "0 CPU"
