"""Tests of the metrics of replicas, of the load policy and of the challenger."""

from types import SimpleNamespace

import pytest

from parcelray.serving.engine.engine import EngineStats
from parcelray.serving.ingress.metrics import EndpointMetrics


def value(metrics: EndpointMetrics, name: str, **labels: str) -> float | None:
    metrics.text()
    return metrics.registry.get_sample_value(f"parcel:{name}", {"model_name": "m", **labels})


def stats(engine: str, steps: int = 0, **changes: int) -> EngineStats:
    return EngineStats(
        engine=engine, steps=steps, decoded_rows=3 * steps, kv_tokens_used=10, kv_tokens_total=40, **changes
    )


def test_counters_of_replicas_add_up_and_gauges_are_current() -> None:
    metrics = EndpointMetrics("m")
    for each in (
        stats("a", 5, feature_cache_hits=2, feature_cache_misses=1, running=4),
        stats("b", 1),
        stats("a", 7, feature_cache_hits=3, running=2),
    ):
        metrics.update(each)
    # Statistics that arrive late are ignored.
    metrics.update(stats("a", 6, running=9))
    assert value(metrics, "decode_steps_total", engine="0") == 7
    assert value(metrics, "decode_rows_total", engine="0") == 21
    assert value(metrics, "feature_cache_hits_total", engine="0") == 3
    assert value(metrics, "decode_steps_total", engine="1") == 1
    assert value(metrics, "num_requests_running", engine="0") == 2
    assert value(metrics, "kv_cache_usage_perc", engine="1") == 0.25


def test_the_label_of_a_removed_replica_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("parcelray.serving.ingress.metrics.time", SimpleNamespace(monotonic=lambda: now[0]))
    metrics = EndpointMetrics("m")
    metrics.update(stats("a", 5))
    metrics.update(stats("b", 5))
    now[0] = 50.0
    metrics.update(stats("b", 6))
    now[0] = 90.0
    assert value(metrics, "kv_cache_usage_perc", engine="0") is None
    assert value(metrics, "kv_cache_usage_perc", engine="1") == 0.25
    assert metrics.update(stats("c", 2)) == "0"
    assert value(metrics, "decode_steps_total", engine="0") == 7
    # The replica was only silent: its earlier counts are not added again.
    assert metrics.update(stats("a", 8)) == "2"
    assert value(metrics, "decode_steps_total", engine="2") == 3


def test_the_load_time_is_kept() -> None:
    metrics = EndpointMetrics("m")
    metrics.update(EngineStats(engine="a", load_s=12.5))
    metrics.update(stats("a", 5))
    assert value(metrics, "model_load_seconds", engine="0") == 12.5


def test_policy_steps_and_the_challenger_are_reported() -> None:
    metrics = EndpointMetrics("m")
    metrics.load_policy(64, lowered=2, raised=0)
    metrics.load_policy(256, lowered=0, raised=1)
    assert value(metrics, "auto_visual_tokens") == 256
    assert value(metrics, "budget_steps_total", direction="down") == 2
    assert value(metrics, "budget_steps_total", direction="up") == 1
    metrics.challenger("v2", rolled_back=False)
    assert value(metrics, "challenger_rolled_back", version="v2") == 0
    metrics.challenger("v3", rolled_back=True)
    assert value(metrics, "challenger_rolled_back", version="v3") == 1
    assert value(metrics, "challenger_rolled_back", version="v2") is None
    metrics.watch_in_flight(lambda: 7)
    assert value(metrics, "num_requests_in_flight") == 7
