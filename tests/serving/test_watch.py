"""Tests of the sentences about deaths and replacements, from scripted states of Serve."""

from typing import Any

import pytest

from parcelray.serving.watch import DeathWatch


def state(
    *replicas: str, target: int, ingress: str = "i1", proxy: str = "p1", proxy_status: str = "HEALTHY"
) -> dict[str, Any]:
    """Returns what runs: replicas of the model, such as `r1` or `r1 STARTING`, an ingress and a proxy."""

    def deployment(name: str, names: tuple[str, ...], target: int) -> dict[str, Any]:
        found = [{"replica_id": each.split()[0], "state": [*each.split(), "RUNNING"][1]} for each in names]
        return {name: {"replicas": found, "target_num_replicas": target}}

    return {
        "applications": {
            "model-1": {"deployments": deployment("Model", replicas, target)},
            "mini": {"deployments": deployment("Ingress", (ingress,), 1)},
            "other": {"deployments": deployment("Foreign", (), 3)},
        },
        "proxies": {"node": {"actor_id": proxy, "status": proxy_status}},
    }


@pytest.mark.parametrize(
    ("states", "sentences"),
    [
        pytest.param(
            [(0, state("r1", target=1)), (2, state("r2 STARTING", target=1)), (10, state("r2", target=1))],
            ["model replica died; being replaced", "model replica died; replaced after 8 s"],
            id="a replica",
        ),
        pytest.param(
            [
                (0, state("r1", "r2", target=2)),
                (1, state("r3 STARTING", target=2)),
                (5, state("r3", target=2)),
                (9, state("r3", "r4", target=2)),
            ],
            [
                "2 model replicas died; being replaced",
                "model replica died; replaced after 4 s",
                "model replica died; replaced after 8 s",
            ],
            id="both replicas",
        ),
        pytest.param(
            [
                (0, state("r1", target=1)),
                (1, state("r1", target=1, ingress="i1 STOPPING")),
                (4, state("r1", target=1, ingress="i2")),
            ],
            ["ingress died; being replaced", "ingress died; replaced after 3 s"],
            id="the ingress",
        ),
        pytest.param(
            [
                (0, state("r1", target=1)),
                (3, state("r1", target=1, proxy="p2", proxy_status="STARTING")),
                (6, state("r1", target=1, proxy="p2")),
            ],
            ["proxy died; being replaced", "proxy died; replaced after 3 s"],
            id="the proxy",
        ),
        pytest.param(
            [
                (0, state("r1", target=1)),
                (1, state("r1", "r2 STARTING", target=2)),
                (5, state("r1", "r2", target=2)),
                (9, state("r1", "r2 STOPPING", target=1)),
                (12, state("r1", target=1)),
            ],
            [],
            id="the autoscaler",
        ),
    ],
)
def test_a_death_and_its_end_are_one_sentence_each(
    states: list[tuple[float, dict[str, Any]]], sentences: list[str]
) -> None:
    watch = DeathWatch(["mini", "model-1"])
    assert [sentence for now, each in states for sentence in watch.update(each, now)] == sentences
