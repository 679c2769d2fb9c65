"""How many trials a cluster holds, and what it can never hold."""

import pytest

from parcelray.errors import UserError
from parcelray.tuning.trial_resources import TrialResources


def test_a_cluster_holds_as_many_as_its_resources_and_its_nodes_allow() -> None:
    need = TrialResources(cpus=0.01, workers=1, worker_cpus=2.0, helper_cpus=1.0)
    assert need.concurrency([{"CPU": 8.0}], None) == 2
    assert need.concurrency([{"CPU": 8.0}], 1) == 1
    assert TrialResources(cpus=0.25).concurrency([{"CPU": 4.0}], None) == 16
    assert TrialResources(cpus=1.0, gpus=0.5).concurrency([{"CPU": 4.0, "GPU": 1.0}], None) == 2
    # Of three nodes of four CPUs each holds one worker of three.
    assert TrialResources(cpus=0.01, workers=2, worker_cpus=3.0).concurrency([{"CPU": 4.0}] * 3, None) == 1


@pytest.mark.parametrize(
    ("resources", "nodes", "message"),
    [
        (
            TrialResources(cpus=0.01, workers=1, worker_cpus=3.0),
            [{"CPU": 2.0}],
            "A trial needs 3.01 CPU, but the Ray cluster has 2 CPU in all",
        ),
        (
            TrialResources(cpus=1.0, gpus=1.0),
            [{"CPU": 4.0}],
            "needs 1 CPU and 1 GPU, but the Ray cluster has 4 CPU and 0 GPU",
        ),
        (
            TrialResources(cpus=6.0),
            [{"CPU": 4.0}] * 2,
            r"A trial needs 6 CPU on one node, but .* nodes \(4 CPU; 4 CPU\) have room for 0",
        ),
        (
            TrialResources(cpus=0.01, workers=2, worker_cpus=3.0),
            [{"CPU": 4.0}, {"CPU": 2.5}, {"CPU": 2.5}],
            "2 workers, each of which needs 3 CPU on one node",
        ),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_numbers(
    resources: TrialResources, nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resources.concurrency(nodes, None)
