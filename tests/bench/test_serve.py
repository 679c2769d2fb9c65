"""`parcelray bench serve`: its measures follow from known times; a small run has every comparison."""

import socket
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from parcelray.bench import serve as serve_bench
from parcelray.bench.load_generator import LoadResult
from parcelray.bench.measure import Measure
from parcelray.config.model import MiniModelConfig

pytestmark = pytest.mark.serving
SMALL = MiniModelConfig(
    vision_width=24,
    vision_layers=1,
    vision_heads=2,
    vision_mlp_width=32,
    text_width=24,
    text_layers=1,
    text_heads=2,
    text_head_dim=12,
    text_mlp_width=32,
)
# A stand-in for the bench: no model is needed, because no request is sent.
BENCH: Any = SimpleNamespace(
    body=lambda *_, **__: b"{}",
    samples=lambda count: [None] * count,
    job=lambda policy=None: policy,
    model=None,
    processor=None,
)


def answered(latencies_s: list[float], seconds: float = 1.0, **more: Any) -> LoadResult:
    return LoadResult(seconds=seconds, latencies_s=latencies_s, statuses=Counter({200: len(latencies_s)}), **more)


def by_name(measures: list[Measure]) -> dict[str, float]:
    return {measure.name: measure.value for measure in measures}


def test_a_ratio_is_the_median_of_its_rounds() -> None:
    found = serve_bench._ratio("r", [2.0, 6.0, 9.0], [1.0, 2.0, 9.0], ">= 2", "theirs")
    assert (found.value, found.unit, found.goal) == (2.0, "ratio", ">= 2")


def test_the_endpoint_is_compared_with_offline_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def generate(*_: Any, **__: Any) -> None:
        now[0] += 4.0

    monkeypatch.setattr(serve_bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(serve_bench, "Predictor", lambda *_, **__: SimpleNamespace(generate=generate))
    monkeypatch.setattr(
        serve_bench, "closed_loop", lambda _, bodies, clients: answered([0.1] * len(bodies), seconds=5.0)
    )
    assert by_name(serve_bench._against_offline(BENCH, "", requests=20, repeats=3)) == {
        "offline batches of 32, 256 tokens": 5.0,
        "endpoint, 32 clients, 256 tokens": 4.0,
        "endpoint over offline": pytest.approx(0.8),
    }


def test_the_overhead_is_the_difference_to_a_request_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async def in_process(*_: Any) -> float:
        return 0.010

    for name in ("LocalClient", "PromptBuilder"):
        monkeypatch.setattr(serve_bench, name, lambda _: None)
    monkeypatch.setattr(serve_bench, "ContinuousEngine", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(serve_bench, "_in_process", in_process)
    monkeypatch.setattr(serve_bench, "closed_loop", lambda *_, **__: answered([0.025]))
    found = by_name(serve_bench._one_request(BENCH, "", repeats=1))
    for budget in (16, 256):
        assert found[f"one request in process, {budget} tokens"] == pytest.approx(10)
        assert found[f"overhead of the endpoint, {budget} tokens"] == pytest.approx(15)


def test_latencies_are_quantiles_by_budget_and_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: str, bodies: Any, *, clients: int) -> LoadResult:
        # 1 to 100 ms for one client, and `clients` times as long for more clients.
        latencies = [clients * each / 1000 for each in range(1, 101)]
        return answered(latencies, seconds=2.0, first_tokens_s=[each / 2 for each in latencies])

    monkeypatch.setattr(serve_bench, "closed_loop", load)
    found = by_name(serve_bench._by_concurrency(BENCH, "", requests=100))
    assert len(found) == 3 * 3 * 7
    for clients in (1, 8, 32):
        name = f"64 tokens, {clients} clients"
        assert found[f"{name}: throughput"] == 50.0
        assert [found[f"{name}: whole answer, p{share}"] for share in (50, 95, 99)] == pytest.approx(
            [51 * clients, 96 * clients, 100 * clients]
        )
        assert found[f"{name}: first token, p50"] == pytest.approx(25.5 * clients)


def test_the_highest_rate_is_the_last_within_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def load(_: str, bodies: Any, *, rate: float, seed: int) -> LoadResult:
        rates.append(rate)
        # A single miss below the limit, as on a busy machine, does not end the search. Four of 100 may be late.
        late = 100 if rate > 20 or len(rates) == 3 else 4
        return answered([0.5] * (100 - late) + [1.5] * late, budgets=Counter({"16": 1}))

    monkeypatch.setattr(serve_bench, "open_loop", load)
    found = serve_bench._highest_rate(BENCH, "", 256, alone_s=0.1, load_seconds=1.0)
    assert rates == pytest.approx([5 * 1.2**step for step in range(10)])
    assert found.rate == pytest.approx(5 * 1.2**7)
    assert found.budgets == {"16": 1}
    # A load with refused requests does not meet the objective.
    refused = LoadResult(seconds=1.0, latencies_s=[0.1], statuses=Counter({200: 1, 429: 1}))
    monkeypatch.setattr(serve_bench, "open_loop", lambda *_, **__: refused)
    assert serve_bench._highest_rate(BENCH, "", 256, alone_s=0.1, load_seconds=1.0).rate == 0.0


def test_the_load_policy_is_compared_with_the_largest_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed: list[Any] = []
    rates = {
        256: serve_bench._Sustained(10.0, Counter({"256": 4})),
        "auto": serve_bench._Sustained(16.0, Counter({"16": 3, "256": 1})),
    }
    monkeypatch.setattr(serve_bench, "closed_loop", lambda *_, **__: answered([0.1] * 8))
    monkeypatch.setattr(serve_bench, "_highest_rate", lambda _, url, budget, alone_s, seconds: rates[budget])
    monkeypatch.setattr(serve_bench, "pin", lambda policy: policy)
    monkeypatch.setattr(serve_bench, "deploy", deployed.append)
    found = by_name(serve_bench._load_policy(BENCH, "", 1.0))
    (policy,) = deployed
    assert (policy["type"], policy["objective_s"]) == ("load", pytest.approx(0.7))
    assert found["objective: p95 of the whole request"] == pytest.approx(1000)
    assert found["by load over fixed"] == pytest.approx(1.6)
    assert [found[f"by load, share of {budget} tokens"] for budget in (16, 64, 256)] == [0.75, 0.0, 0.25]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_every_comparison_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_bench, "_CLIMB", 2.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    report = serve_bench.bench_serving(requests=32, repeats=1, port=port, threads=1, load_seconds=1.0, model=SMALL)
    found = {measure.name: measure for measure in report.measures}
    goals = {name: measure.goal for name, measure in found.items() if measure.goal is not None}
    assert goals == {
        "overhead of the endpoint, 16 tokens": "<= 15",
        "overhead of the endpoint, 256 tokens": "<= 15",
        "endpoint over offline": ">= 0.85",
        "endpoint over plain server": ">= 2",
        "by load over fixed": ">= 1.5",
    }
    for budget in (16, 64, 256):
        for clients in (1, 8, 32):
            name = f"{budget} tokens, {clients} clients"
            for share in (50, 95, 99):
                assert (
                    0 < found[f"{name}: first token, p{share}"].value <= found[f"{name}: whole answer, p{share}"].value
                )
