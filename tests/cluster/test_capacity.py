"""What a job needs is compared with what a cluster holds and may hold, and waited for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo, NodeUsage, ResourceUsage

from parcelray.cluster import capacity
from parcelray.cluster.capacity import Capacity, Need, NodeType, Part, await_capacity, check_capacity, node_types
from parcelray.errors import SystemFailure, UserError

HEAD = {"node:__internal_head__": 1.0}
CPU_TYPE = NodeType("cpu_worker", {"CPU": 16.0}, 6)
GPU_TYPE = NodeType("gpu_worker", {"CPU": 16.0, "GPU": 1.0}, 4)
SHIPPED = Capacity((HEAD,), (CPU_TYPE, GPU_TYPE), most=8)
"""The cluster of ray_cluster.yaml before any worker has started, with a smaller limit of all nodes."""


def _need(workers: int, cpus: float, gpus: float = 0.0) -> Need:
    parts = (Part(workers, "worker", {"CPU": cpus, "GPU": gpus}), Part(1, "data task", {"CPU": 0.5}))
    return Need("The training", parts, "lower scaling.num_workers")


@pytest.mark.parametrize(
    ("cluster", "need", "times"),
    [
        (Capacity(({"CPU": 4.0},)), _need(2, 1.0), 1),
        (Capacity(({"CPU": 5.0},)), _need(2, 1.0), 2),
        # Three tenths and a half are exactly eight tenths, although their sum as floating-point numbers is not.
        (Capacity(({"CPU": 0.8},)), _need(3, 0.1), 1),
        (Capacity(({"CPU": 2.0}, {"CPU": 2.0})), _need(1, 3.0), 0),
        (Capacity(()), _need(1, 1.0), 0),
        (SHIPPED, _need(2, 1.0), 40),
        (SHIPPED, _need(4, 1.0, 1.0), 1),
        (SHIPPED, _need(5, 1.0, 1.0), 0),
        (SHIPPED, _need(1, 17.0), 0),
        # Eight nodes in all, although the types alone allow ten.
        (SHIPPED, _need(8, 15.0), 1),
        (SHIPPED, _need(9, 15.0), 0),
        # Nodes that no type explains, such as those that a person added.
        (Capacity((HEAD, {"CPU": 64.0}), (CPU_TYPE,), most=6), _need(1, 60.0), 1),
        (Capacity((HEAD,), is_known=False), _need(1, 60.0), 1),
    ],
)
def test_the_room_of_a_cluster(cluster: Capacity, need: Need, times: int) -> None:
    assert cluster.room_for(need, 40) == times
    assert cluster.room_for(need, 1) == min(times, 1)


@pytest.mark.parametrize(
    ("cluster", "need", "message"),
    [
        (
            Capacity(({"CPU": 4.0}, {"CPU": 4.0})),
            _need(3, 3.0),
            "The training needs 3 workers of 3 CPU each and 1 data task of 0.5 CPU, but the Ray cluster has only 2"
            " nodes of 4 CPU; lower scaling.num_workers, or use a larger cluster.",
        ),
        (
            SHIPPED,
            _need(5, 1.0, 1.0),
            "The training needs 5 workers of 1 CPU and 1 GPU each and 1 data task of 0.5 CPU, but the Ray cluster has"
            " only a head node of 0 CPU and up to 6 cpu_worker of 16 CPU and up to 4 gpu_worker of 16 CPU and 1 GPU (8"
            " nodes in all); lower scaling.num_workers, or use a larger cluster.",
        ),
    ],
)
def test_what_a_cluster_can_never_hold_is_refused_with_the_numbers(cluster: Capacity, need: Need, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        cluster.check(need)
    assert str(refusal.value) == message


def test_the_node_types_of_the_shipped_cluster_are_read(repo_root: Path) -> None:
    types, most = node_types(str(repo_root / "ray_cluster.yaml"))
    assert (types, most) == ((CPU_TYPE, GPU_TYPE), 10)


def _node(**free: float) -> NodeInfo:
    usage = [ResourceUsage(name, total=amount, used=0.0) for name, amount in free.items()]
    return NodeInfo("", "gpu_worker", "", "", resource_usage=NodeUsage(usage, 0))


def _launch(state: LaunchRequest.Status, **changes: Any) -> LaunchRequest:
    return LaunchRequest("", "gpu_worker", 1, state, 0, **changes)


@pytest.mark.parametrize(
    ("status", "starting", "reason"),
    [
        (
            ClusterStatus(active_nodes=[_node(CPU=0.0)], idle_nodes=[_node(CPU=16.0, GPU=1.0)]),
            2,
            "waiting for 2 CPU and 2 GPU; 2 of 4 nodes starting",
        ),
        (ClusterStatus(idle_nodes=[_node(CPU=16.0, GPU=2.0)]), 0, "waiting for 1 CPU and 1 GPU"),
        (
            ClusterStatus(
                idle_nodes=[_node(CPU=0.5)],
                failed_launches=[
                    _launch(LaunchRequest.Status.FAILED, failed_ts_s=1, details="an older reason"),
                    _launch(LaunchRequest.Status.FAILED, failed_ts_s=9, details="no\nquota"),
                ],
            ),
            0,
            "waiting for 3 CPU and 3 GPU; the last start of a gpu_worker failed (no quota)",
        ),
        # The state of the nodes is older than the request that is not yet granted.
        (
            ClusterStatus(idle_nodes=[_node(CPU=16.0, GPU=4.0)]),
            0,
            "waiting for 3 workers of 1 CPU and 1 GPU each and 1 data task of 0.5 CPU",
        ),
    ],
)
def test_the_reason_of_a_wait(status: ClusterStatus, starting: int, reason: str) -> None:
    assert capacity.waiting_reason(_need(3, 1.0, 1.0), status, starting) == reason


class _Group:
    """A placement group that is granted at one of its polls."""

    def __init__(self, granted_at: int) -> None:
        self.granted_at = granted_at
        self.bundles: list[dict[str, float]] = []
        self.polls = 0
        self.removed = False

    def request(self, bundles: list[dict[str, float]], strategy: str) -> "_Group":
        self.bundles = bundles
        return self

    def wait(self, timeout_seconds: float) -> bool:
        self.polls += 1
        return self.polls >= self.granted_at


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Group]:
    """Replaces Ray: a head without CPUs, of whose autoscaler one node is starting."""
    group = _Group(granted_at=4)

    def remove(removed: _Group) -> None:
        removed.removed = True

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": HEAD}, {"Alive": False, "Resources": {}}])
    monkeypatch.setattr(capacity, "read_capacity", lambda: SHIPPED)
    monkeypatch.setattr(capacity, "placement_group", group.request)
    monkeypatch.setattr(capacity, "remove_placement_group", remove)
    monkeypatch.setattr(capacity, "_cluster_status", lambda: (ClusterStatus(), 1))
    yield group
    assert group.removed == (group.polls > 0)


def test_a_job_waits_with_one_sentence_until_nodes_have_started(group: _Group) -> None:
    said: list[str] = []
    await_capacity(_need(2, 1.0, 1.0), 1800.0, "scaling.wait_s", said.append)
    assert said == ["Waiting for 2.5 CPU and 2 GPU; 1 of 1 nodes starting"]
    assert group.bundles == [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.5}]
    assert group.polls == 4


def test_a_job_that_gets_its_resources_at_once_says_nothing(group: _Group) -> None:
    group.granted_at = 1
    said: list[str] = []
    await_capacity(_need(2, 1.0), 1800.0, "scaling.wait_s", said.append)
    assert said == []


def test_a_wait_ends_with_the_numbers_and_the_key(group: _Group) -> None:
    group.granted_at = 10**9
    seconds = iter(range(0, 10**6, 20))
    with pytest.raises(SystemFailure) as failure:
        await_capacity(
            _need(2, 1.0, 1.0), 60.0, "scaling.wait_s", lambda line: None, clock=lambda: float(next(seconds))
        )
    assert str(failure.value) == (
        "The training did not get 2 workers of 1 CPU and 1 GPU each and 1 data task of 0.5 CPU within 60 s: waiting for"
        " 2.5 CPU and 2 GPU; 1 of 1 nodes starting. Raise scaling.wait_s, stop other programs on the cluster, or lower"
        " scaling.num_workers; then run the same command again."
    )


def test_what_can_never_fit_is_not_requested(group: _Group) -> None:
    with pytest.raises(UserError, match="needs 5 workers of 1 CPU and 1 GPU each"):
        await_capacity(_need(5, 1.0, 1.0), 1800.0, "scaling.wait_s", lambda line: None)
    assert group.polls == 0


@pytest.mark.ray
def test_resources_in_use_are_waited_for_and_released_again(ray_session: None) -> None:
    @ray.remote(num_cpus=3)
    class Busy:
        def begin(self) -> None:
            pass

    with pytest.raises(UserError, match="only 1 node of 4 CPU"):
        check_capacity(_need(9, 1.0))
    busy = Busy.remote()  # type: ignore[attr-defined]
    ray.get(busy.begin.remote())
    with pytest.raises(SystemFailure, match=r"within 0\.1 s: waiting for 0\.5 CPU\."):
        await_capacity(_need(1, 1.0), 0.1, "scaling.wait_s", lambda line: None)

    said: list[str] = []

    def release(line: str) -> None:
        said.append(line)
        ray.kill(busy)

    await_capacity(_need(3, 1.0), 300.0, "scaling.wait_s", release)
    await_capacity(_need(3, 1.0), 300.0, "scaling.wait_s", said.append)
    assert said[0] == "Waiting for 2.5 CPU"
