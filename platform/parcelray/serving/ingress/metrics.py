"""Prometheus metrics of an endpoint, named as in other serving engines, with the visual-token budget as a label.

Ray exports its own metrics (queues, replicas, autoscaling) on its own port. The ones here are known only to the
ingress. Replicas send their statistics with every answer, and the ingress polls them once per second. vLLM's
`num_preemptions` and `prefix_cache_*` are missing on purpose: running requests are never preempted, and the engine
caches image features (`feature_cache_*`) instead of prefixes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from parcelray.serving.engine.engine import EngineStats, Finished, GenerateRequest

_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_EXPIRY_S = 60.0
"""Time without statistics after which a replica counts as stopped, seconds."""
_COUNTERS: dict[str, Callable[[EngineStats], int]] = {
    "feature_cache_hits": lambda stats: stats.feature_cache_hits,
    "feature_cache_queries": lambda stats: stats.feature_cache_hits + stats.feature_cache_misses,
    "decode_steps": lambda stats: stats.steps,
    "decode_rows": lambda stats: stats.decoded_rows,
}
"""Counters that are computed from the statistics of a replica since its start."""


@dataclass
class _Replica:
    """The last statistics of one replica."""

    engine: str
    """Label of the replica: a small number, reused after the replica has stopped, which bounds the number of series."""
    updated: float
    stats: EngineStats


class EndpointMetrics:
    """The metrics of one ingress.

    Args:
        model_name: label of every metric.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._replicas: dict[str, _Replica] = {}
        self._counted_of: dict[str, EngineStats] = {}
        """Statistics that the counters include, by replica; not removed, because a silent replica may come back."""
        by_budget = ["model_name", "visual_tokens"]

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"parcel:{name}", text, [*by_budget, "engine"], buckets=buckets, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"parcel:{name}", text, ["model_name", "engine"], registry=self.registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"parcel:{name}", text, ["model_name", "engine"], registry=self.registry)

        self._histograms = {
            "time_to_first_token_seconds": histogram(
                "time_to_first_token_seconds", "From arrival at the ingress to the first token"
            ),
            "e2e_request_latency_seconds": histogram(
                "e2e_request_latency_seconds", "From arrival at the ingress to the end of the answer"
            ),
            "request_queue_time_seconds": histogram(
                "request_queue_time_seconds", "From arrival at the engine to the start of the prefill"
            ),
            "request_prefill_time_seconds": histogram("request_prefill_time_seconds", "Duration of the prefill batch"),
            "request_decode_time_seconds": histogram("request_decode_time_seconds", "From the first token to the last"),
            "inter_token_latency_seconds": histogram(
                "inter_token_latency_seconds", "Mean time between two tokens of a request"
            ),
            "vision_encode_seconds": histogram("vision_encode_seconds", "Duration of the vision-tower batch"),
            "image_decode_seconds": histogram("image_decode_seconds", "Decoding and scaling of a request's images"),
            "request_prompt_tokens": histogram(
                "request_prompt_tokens", "Prompt tokens, including visual tokens", _TOKENS
            ),
            "request_generation_tokens": histogram("request_generation_tokens", "New tokens", _TOKENS),
        }
        self._tokens = {
            name: Counter(f"parcel:{name}", text, [*by_budget, "engine"], registry=self.registry)
            for name, text in (
                ("prompt_tokens", "Prompt tokens"),
                ("generation_tokens", "New tokens"),
                ("image_tokens", "Visual tokens"),
            )
        }
        self._success = Counter(
            "parcel:request_success",
            "Answered requests",
            [*by_budget, "engine", "finished_reason"],
            registry=self.registry,
        )
        self._rejected = Counter(
            "parcel:requests_rejected", "Refused requests", ["model_name", "reason"], registry=self.registry
        )
        self._decisions = Counter(
            "parcel:budget_decisions",
            "Visual-token budgets assigned to requests",
            [*by_budget, "asked"],
            registry=self.registry,
        )
        self._samples_dropped = Counter(
            "parcel:samples_dropped",
            "Request samples that were not written to MLflow",
            ["model_name"],
            registry=self.registry,
        )
        self._log_records_dropped = Counter(
            "parcel:log_records_dropped",
            "Records of the log, such as those of requests, that could not be written",
            ["model_name"],
            registry=self.registry,
        )
        self._retries = Counter(
            "parcel:request_retries", "Requests sent to another replica", ["model_name"], registry=self.registry
        )
        self._routed = Counter(
            "parcel:requests_routed",
            "Requests by model version and outcome",
            ["model_name", "version", "outcome"],
            registry=self.registry,
        )
        self._auto = Gauge(
            "parcel:auto_visual_tokens",
            "Current budget of requests that leave it open",
            ["model_name"],
            registry=self.registry,
        )
        self._steps = Counter(
            "parcel:budget_steps",
            "Budget changes by the load policy",
            ["model_name", "direction"],
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "parcel:num_requests_in_flight", "Requests in flight in the ingress", ["model_name"], registry=self.registry
        )
        self._rolled_back = Gauge(
            "parcel:challenger_rolled_back",
            "1: the challenger was rolled back and gets no requests",
            ["model_name", "version"],
            registry=self.registry,
        )
        self._counted = {
            "feature_cache_hits": counter("feature_cache_hits", "Images whose features were in the cache"),
            "feature_cache_queries": counter("feature_cache_queries", "Image lookups in the feature cache"),
            "decode_steps": counter("decode_steps", "Decode steps"),
            "decode_rows": counter("decode_rows", "Sum of batch sizes over all decode steps"),
        }
        self._gauges = {
            "num_requests_running": gauge("num_requests_running", "Running requests"),
            "num_requests_waiting": gauge("num_requests_waiting", "Requests in the engine's queue"),
            "kv_cache_usage_perc": gauge("kv_cache_usage_perc", "Reserved share of the KV cache, 0 to 1"),
            "feature_cache_bytes": gauge("feature_cache_bytes", "Size of the cached patch features"),
            "model_load_seconds": gauge(
                "model_load_seconds", "Time from the start of a replica until its model was loaded and warmed up"
            ),
        }

    def decided(self, requested: int | str, budget: int) -> None:
        """Counts the budget that a request got."""
        self._decisions.labels(self._model, budget, requested if isinstance(requested, str) else "tokens").inc()

    def load_policy(self, budget: int, *, lowered: int, raised: int) -> None:
        """Reports the budget that the load policy gives now to requests that leave it open.

        Args:
            budget: visual tokens.
            lowered: steps down since the last call.
            raised: steps up since the last call.
        """
        self._auto.labels(self._model).set(budget)
        self._steps.labels(self._model, "down").inc(lowered)
        self._steps.labels(self._model, "up").inc(raised)

    def watch_in_flight(self, count: Callable[[], int]) -> None:
        """Sets the function that returns the number of requests in flight at each scrape."""
        self._in_flight.labels(self._model).set_function(count)

    def challenger(self, version: str | None, *, rolled_back: bool) -> None:
        """Reports whether the challenger, if there is one, was rolled back."""
        self._rolled_back.clear()
        if version is not None:
            self._rolled_back.labels(self._model, version).set(rolled_back)

    def rejected(self, reason: str) -> None:
        """Counts a refused request; `reason` is its error code."""
        self._rejected.labels(self._model, reason).inc()

    def samples_dropped(self, count: int) -> None:
        """Counts samples that were lost."""
        self._samples_dropped.labels(self._model).inc(count)

    def log_records_dropped(self, count: int) -> None:
        """Counts log records that were lost."""
        self._log_records_dropped.labels(self._model).inc(count)

    def retried(self) -> None:
        """Counts a request that was sent to another replica."""
        self._retries.labels(self._model).inc()

    def routed(self, version: str, outcome: str) -> None:
        """Counts a request of a model version; `outcome` is `answered` or `failed`."""
        self._routed.labels(self._model, version, outcome).inc()

    def finished(
        self, request: GenerateRequest, end: Finished, *, latency_s: float, first_token_s: float, image_s: float
    ) -> None:
        """Records an answered request; the latencies are from its arrival at the ingress, seconds."""
        engine = self.update(end.stats)
        budget = request.num_visual_tokens
        timings = end.timings
        decode_s = timings.total_s - timings.first_token_s
        values = {
            "time_to_first_token_seconds": first_token_s,
            "e2e_request_latency_seconds": latency_s,
            "request_queue_time_seconds": timings.queue_s,
            "request_prefill_time_seconds": timings.prefill_s,
            "request_decode_time_seconds": decode_s,
            "vision_encode_seconds": timings.vision_s,
            "image_decode_seconds": image_s,
            "request_prompt_tokens": request.num_prompt_tokens,
            "request_generation_tokens": end.num_new_tokens,
        }
        if end.num_new_tokens > 1:
            values["inter_token_latency_seconds"] = decode_s / (end.num_new_tokens - 1)
        for name, value in values.items():
            self._histograms[name].labels(self._model, budget, engine).observe(value)
        for name, count in (
            ("prompt_tokens", request.num_prompt_tokens),
            ("generation_tokens", end.num_new_tokens),
            ("image_tokens", request.tokens.visual),
        ):
            self._tokens[name].labels(self._model, budget, engine).inc(count)
        self._success.labels(self._model, budget, engine, end.reason).inc()

    def update(self, stats: EngineStats) -> str:
        """Takes new statistics of a replica over and returns the replica's label."""
        self._remove_expired()
        known = self._replicas.get(stats.engine)
        if known is None:
            taken = {replica.engine for replica in self._replicas.values()}
            known = _Replica(
                next(str(number) for number in range(len(taken) + 1) if str(number) not in taken), 0.0, EngineStats()
            )
            self._replicas[stats.engine] = known
        counted = self._counted_of.get(stats.engine, EngineStats())
        # Statistics may arrive out of order.
        if stats.steps >= counted.steps:
            for name, read in _COUNTERS.items():
                self._counted[name].labels(self._model, known.engine).inc(max(0, read(stats) - read(counted)))
            self._counted_of[stats.engine] = stats
            # Statistics in answers do not include the load time.
            known.stats = replace(stats, load_s=stats.load_s or known.stats.load_s)
        known.updated = time.monotonic()
        return known.engine

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        self._remove_expired()
        for gauge in self._gauges.values():
            gauge.clear()
        for replica in self._replicas.values():
            stats = replica.stats
            values = {
                "num_requests_running": stats.running,
                "num_requests_waiting": stats.waiting,
                "kv_cache_usage_perc": stats.kv_tokens_used / max(1, stats.kv_tokens_total),
                "feature_cache_bytes": stats.feature_cache_bytes,
                "model_load_seconds": stats.load_s,
            }
            for key, value in values.items():
                self._gauges[key].labels(self._model, replica.engine).set(value)
        return generate_latest(self.registry)

    def _remove_expired(self) -> None:
        oldest = time.monotonic() - _EXPIRY_S
        self._replicas = {name: replica for name, replica in self._replicas.items() if replica.updated >= oldest}
