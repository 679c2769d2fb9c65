"""Who gets a request, and when a challenger is sent away."""

import random
from collections.abc import Sequence

import pytest

from parcelray.config.serve import CanaryConfig
from parcelray.serving.engine.engine import PromptBuilder
from parcelray.serving.ingress.clients import ModelClient
from parcelray.serving.ingress.routes import Records, Route, Routes


def route(version: str, share: float = 1.0) -> Route:
    """Nothing is asked of its model here."""
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
    """Both versions' answers (seconds; None: failed), taken in turn as they come."""
    routes = Routes(route("v1"), route("v2", 0.2), canary(), records=records)
    assert routes.challenger is not None
    for place in range(max(len(champion), len(challenger))):
        for each, outcomes in ((routes.champion, champion), (routes.challenger, challenger)):
            if place < len(outcomes):
                routes.record(each, outcomes[place])
    return routes


def test_the_challenger_gets_its_share() -> None:
    routes = Routes(route("v1"), route("v2", 0.2), canary(), rng=random.Random(0))
    picked = [routes.pick().version for _ in range(5000)]
    assert picked.count("v2") / 5000 == pytest.approx(0.2, abs=0.02)
    assert [each.share for each in routes.all] == [0.8, 0.2]


def test_a_good_challenger_stays() -> None:
    rng = random.Random(0)
    ours, theirs = ([rng.uniform(0.1, 0.3) if rng.random() > 0.02 else None for _ in range(400)] for _ in range(2))
    routes = compared(ours, theirs)
    assert routes.rolled_back is None
    assert [each.share for each in routes.all] == [0.8, 0.2]


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [
        ([0.2, 0.2, 0.2, None] * 10, "25.0% of its requests failed"),
        ([0.5] * 40, "its median latency is 500 ms, the champion's is 200 ms"),
    ],
    ids=["errors", "latency"],
)
def test_a_worse_challenger_goes(outcomes: list[float | None], says: str) -> None:
    routes = compared([0.2] * 40, outcomes)
    assert says in (routes.rolled_back or "")
    assert [each.share for each in routes.all] == [1.0, 0.0]
    assert {routes.pick().version for _ in range(100)} == {"v1"}


def test_errors_of_both_are_no_fault_of_the_challenger() -> None:
    assert compared([0.2, None] * 20, [0.2, None] * 20).rolled_back is None


@pytest.mark.parametrize(("ours", "theirs"), [(19, 100), (100, 19)])
def test_small_numbers_decide_nothing(ours: int, theirs: int) -> None:
    assert compared([0.2] * theirs, [None] * ours).rolled_back is None


def test_a_challenger_that_went_does_not_come_back_with_new_routes() -> None:
    records = Records()
    reason = compared([0.2] * 40, [0.5] * 40, records).rolled_back
    again = Routes(route("v1"), route("v2", 0.2), canary(), records=records)
    assert again.rolled_back == reason is not None
    assert {again.pick().version for _ in range(100)} == {"v1"}
    assert len(again.champion.outcomes) == 40
    other = Routes(route("v1"), route("v3", 0.2), canary(), records=records)
    assert other.rolled_back is None
    assert [each.share for each in other.all] == [0.8, 0.2]
