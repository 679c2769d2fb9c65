"""How many trials a cluster can run at the same time, and which trials it cannot run."""

import pytest

from parcelray.cluster.capacity import Capacity, NodeType
from parcelray.errors import UserError
from parcelray.tuning.trial_resources import TrialResources


def test_concurrency_is_limited_by_total_resources_and_by_nodes() -> None:
    need = TrialResources(cpus=0.01, workers=1, worker_cpus=2.0, helper_cpus=1.0)
    assert need.concurrency(_cluster(8.0), None) == 2
    assert need.concurrency(_cluster(8.0), 1) == 1
    assert TrialResources(cpus=0.25).concurrency(_cluster(4.0), None) == 16
    assert TrialResources(cpus=1.0, gpus=0.5).concurrency(Capacity(({"CPU": 4.0, "GPU": 1.0},)), None) == 2
    # Each of three nodes with four CPUs has room for one worker with three CPUs.
    assert TrialResources(cpus=0.01, workers=2, worker_cpus=3.0).concurrency(_cluster(4.0, 4.0, 4.0), None) == 1


def test_nodes_that_the_autoscaler_may_start_count() -> None:
    need = TrialResources(cpus=0.01, workers=2, worker_cpus=1.0, worker_gpus=1.0, helper_cpus=2.0)
    head = {"node:__internal_head__": 1.0}
    gpu = NodeType("gpu", {"CPU": 4.0, "GPU": 1.0}, 5)
    assert need.concurrency(Capacity((head,), (gpu,), most=5), None) == 2
    assert need.concurrency(Capacity((head,), (gpu,), most=5), 1) == 1


@pytest.mark.parametrize(
    ("resources", "cluster", "message"),
    [
        (
            TrialResources(cpus=0.01, workers=1, worker_cpus=3.0),
            [2.0],
            "A trial needs 1 process of 0.01 CPU and 1 worker of 3 CPU, but the Ray cluster has only 1 node of 2 CPU;",
        ),
        (
            TrialResources(cpus=1.0, gpus=1.0),
            [4.0],
            "needs 1 process of 1 CPU and 1 GPU, but the Ray cluster has only 1 node of 4 CPU",
        ),
        (TrialResources(cpus=6.0), [4.0, 4.0], "A trial needs 1 process of 6 CPU, but .* only 2 nodes of 4 CPU;"),
        (
            TrialResources(cpus=0.01, workers=2, worker_cpus=3.0),
            [4.0, 2.5, 2.5],
            "2 workers of 3 CPU each, but .* 1 node of 4 CPU and 2 nodes of 2.5 CPU; give the trials fewer workers",
        ),
    ],
)
def test_a_trial_that_does_not_fit_is_refused_with_the_numbers(
    resources: TrialResources, cluster: list[float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resources.concurrency(_cluster(*cluster), None)


def _cluster(*cpus: float) -> Capacity:
    return Capacity(tuple({"CPU": each} for each in cpus))
