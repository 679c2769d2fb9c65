"""Tests of the assignment of requests to versions, and of the rollback of a challenger."""

import random
from collections.abc import Sequence

import pytest

from parcelray.config.serve import CanaryConfig
from parcelray.serving.engine.engine import PromptBuilder
from parcelray.serving.ingress.clients import ModelClient
from parcelray.serving.ingress.routes import Records, Route, Routes


def route(version: str, share: float = 1.0) -> Route:
    """Returns a route without a model."""
    client: ModelClient = None  # type: ignore[assignment]
    prompts: PromptBuilder = None  # type: ignore[assignment]
    return Route(version, client, prompts, {}, share)


def canary(**changes: object) -> CanaryConfig:
    return CanaryConfig.model_validate(
        {"model": {}, "share": 0.2, "min_requests": 20, "max_error_rate": 0.05, "max_latency_ratio": 1.5} | changes
    )


def compared(
    champion: Sequence[float | None], challenger: Sequence[float | None], records: Records | None = None
) -> Routes:
    """Records the outcomes of both versions (seconds; None: failed) in turn."""
    routes = Routes(route("v1"), route("v2", 0.2), canary(), records=records)
    assert routes.challenger is not None
    for index in range(max(len(champion), len(challenger))):
        for each, outcomes in ((routes.champion, champion), (routes.challenger, challenger)):
            if index < len(outcomes):
                routes.record(each, outcomes[index])
    return routes


def test_the_challenger_gets_its_share() -> None:
    routes = Routes(route("v1"), route("v2", 0.2), canary(), rng=random.Random(0))
    picked = [routes.pick().version for _ in range(5000)]
    assert picked.count("v2") / 5000 == pytest.approx(0.2, abs=0.02)
    assert [each.share for each in routes.all] == [0.8, 0.2]


def test_an_equal_challenger_is_kept() -> None:
    rng = random.Random(0)
    ours, theirs = ([rng.uniform(0.1, 0.3) if rng.random() > 0.02 else None for _ in range(400)] for _ in range(2))
    routes = compared(ours, theirs)
    assert routes.rolled_back is None
    assert [each.share for each in routes.all] == [0.8, 0.2]


@pytest.mark.parametrize(
    ("outcomes", "reason"),
    [
        ([0.2, 0.2, 0.2, None] * 10, "25.0% of its requests failed"),
        ([0.5] * 40, "its median latency is 500 ms, the champion's is 200 ms"),
    ],
    ids=["errors", "latency"],
)
def test_a_worse_challenger_is_rolled_back(outcomes: list[float | None], reason: str) -> None:
    routes = compared([0.2] * 40, outcomes)
    assert reason in (routes.rolled_back or "")
    assert [each.share for each in routes.all] == [1.0, 0.0]
    assert {routes.pick().version for _ in range(100)} == {"v1"}


def test_errors_of_both_versions_do_not_roll_back() -> None:
    assert compared([0.2, None] * 20, [0.2, None] * 20).rolled_back is None


@pytest.mark.parametrize(("ours", "theirs"), [(19, 100), (100, 19)])
def test_too_few_requests_do_not_roll_back(ours: int, theirs: int) -> None:
    assert compared([0.2] * theirs, [None] * ours).rolled_back is None


def test_a_rolled_back_challenger_stays_so_after_a_change_of_routes() -> None:
    records = Records()
    reason = compared([0.2] * 40, [0.5] * 40, records).rolled_back
    again = Routes(route("v1"), route("v2", 0.2), canary(), records=records)
    assert again.rolled_back == reason is not None
    assert {again.pick().version for _ in range(100)} == {"v1"}
    assert len(again.champion.outcomes) == 40
    other = Routes(route("v1"), route("v3", 0.2), canary(), records=records)
    assert other.rolled_back is None
    assert [each.share for each in other.all] == [0.8, 0.2]
