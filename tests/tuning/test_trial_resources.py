"""How many trials a cluster can run at the same time, and which trials it cannot run."""

import pytest

from parcelray.errors import UserError
from parcelray.tuning.trial_resources import TrialResources


def test_concurrency_is_limited_by_total_resources_and_by_nodes() -> None:
    need = TrialResources(cpus=0.01, workers=1, worker_cpus=2.0, helper_cpus=1.0)
    assert need.concurrency([{"CPU": 8.0}], None) == 2
    assert need.concurrency([{"CPU": 8.0}], 1) == 1
    assert TrialResources(cpus=0.25).concurrency([{"CPU": 4.0}], None) == 16
    assert TrialResources(cpus=1.0, gpus=0.5).concurrency([{"CPU": 4.0, "GPU": 1.0}], None) == 2
    # Each of three nodes with four CPUs has room for one worker with three CPUs.
    assert TrialResources(cpus=0.01, workers=2, worker_cpus=3.0).concurrency([{"CPU": 4.0}] * 3, None) == 1


@pytest.mark.parametrize(
    ("resources", "nodes", "message"),
    [
        (
            TrialResources(cpus=0.01, workers=1, worker_cpus=3.0),
            [{"CPU": 2.0}],
            "A trial needs 3.01 CPU, but the Ray cluster has 2 CPU in total",
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
def test_a_trial_that_does_not_fit_is_refused_with_the_numbers(
    resources: TrialResources, nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resources.concurrency(nodes, None)
