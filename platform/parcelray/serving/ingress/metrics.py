"""Metrics of an endpoint, by the names that dashboards of serving engines know, with the visual-token budget as a label.

Ray's own metrics (queues, replicas, autoscaling) come from Ray's port; these are what only the ingress sees. What the
replicas say of themselves comes with every answer, and once a second beside them. vLLM's `num_preemptions` and
`prefix_cache_*` are not among them: nothing that runs is ever thrown out, and what is kept of a request is its images'
features (`feature_cache_*`).
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
_FORGET_S = 60.0
"""A replica that was not heard of for so long is gone."""
_COUNTED: dict[str, Callable[[EngineStats], int]] = {
    "feature_cache_hits": lambda stats: stats.feature_cache_hits,
    "feature_cache_queries": lambda stats: stats.feature_cache_hits + stats.feature_cache_misses,
    "decode_steps": lambda stats: stats.steps,
    "decode_rows": lambda stats: stats.decoded_rows,
}
"""Counters out of what a replica has done since its start."""


@dataclass
class _Replica:
    """What is known of one replica."""

    engine: str
    """Its label: a small number, which another replica gets when it is gone, so that there are only so many series."""
    heard: float
    stats: EngineStats


class EndpointMetrics:
    """Counts what one ingress does.

    Args:
        model_name: label of every metric.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._replicas: dict[str, _Replica] = {}
        self._counted_of: dict[str, EngineStats] = {}
        """What the counters hold of each replica; kept of those that are gone, which may only have been silent."""
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
            "request_prefill_time_seconds": histogram("request_prefill_time_seconds", "Of the prefill batch"),
            "request_decode_time_seconds": histogram("request_decode_time_seconds", "From the first token to the last"),
            "inter_token_latency_seconds": histogram(
                "inter_token_latency_seconds", "Mean time between two tokens of a request"
            ),
            "vision_encode_seconds": histogram("vision_encode_seconds", "Of the vision tower's batch"),
            "image_decode_seconds": histogram("image_decode_seconds", "Decoding and scaling of a request's images"),
            "request_prompt_tokens": histogram("request_prompt_tokens", "Prompt tokens, visual ones included", _TOKENS),
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
            "parcel:request_success", "Answers", [*by_budget, "engine", "finished_reason"], registry=self.registry
        )
        self._rejected = Counter(
            "parcel:requests_rejected", "Refused requests", ["model_name", "reason"], registry=self.registry
        )
        self._decisions = Counter(
            "parcel:budget_decisions", "Budgets given to requests", [*by_budget, "asked"], registry=self.registry
        )
        self._samples_dropped = Counter(
            "parcel:samples_dropped",
            "Samples of requests that MLflow did not get",
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
            "Budget that requests get now that leave it open",
            ["model_name"],
            registry=self.registry,
        )
        self._steps = Counter(
            "parcel:budget_steps", "Steps of the load policy", ["model_name", "direction"], registry=self.registry
        )
        self._in_flight = Gauge(
            "parcel:num_requests_in_flight", "Requests that the ingress holds", ["model_name"], registry=self.registry
        )
        self._rolled_back = Gauge(
            "parcel:challenger_rolled_back",
            "1: the challenger did worse and gets no requests",
            ["model_name", "version"],
            registry=self.registry,
        )
        self._counted = {
            "feature_cache_hits": counter("feature_cache_hits", "Images that skipped the vision tower"),
            "feature_cache_queries": counter("feature_cache_queries", "Images that were looked up"),
            "decode_steps": counter("decode_steps", "Decode steps"),
            "decode_rows": counter("decode_rows", "Requests over all decode steps"),
        }
        self._gauges = {
            "num_requests_running": gauge("num_requests_running", "Requests that share decode steps"),
            "num_requests_waiting": gauge("num_requests_waiting", "Requests in the engine's queue"),
            "kv_cache_usage_perc": gauge("kv_cache_usage_perc", "Reserved share of the KV cache, 0 to 1"),
            "feature_cache_bytes": gauge("feature_cache_bytes", "Patch features that are kept"),
            "model_load_seconds": gauge(
                "model_load_seconds", "From the start of a replica until its model was loaded and warmed up"
            ),
        }

    def decided(self, asked: int | str, budget: int) -> None:
        """A request got a budget."""
        self._decisions.labels(self._model, budget, asked if isinstance(asked, str) else "tokens").inc()

    def load_policy(self, budget: int, *, lowered: int, raised: int) -> None:
        """What requests get now that leave their budget open.

        Args:
            budget: visual tokens.
            lowered: steps down since the last call.
            raised: steps up since then.
        """
        self._auto.labels(self._model).set(budget)
        self._steps.labels(self._model, "down").inc(lowered)
        self._steps.labels(self._model, "up").inc(raised)

    def watch_in_flight(self, count: Callable[[], int]) -> None:
        """How many requests the ingress holds, asked at each scrape."""
        self._in_flight.labels(self._model).set_function(count)

    def challenger(self, version: str | None, *, rolled_back: bool) -> None:
        """Whether the challenger, if there is one, was sent away."""
        self._rolled_back.clear()
        if version is not None:
            self._rolled_back.labels(self._model, version).set(rolled_back)

    def rejected(self, reason: str) -> None:
        """A request was refused; `reason` is one of the error codes."""
        self._rejected.labels(self._model, reason).inc()

    def samples_dropped(self, count: int) -> None:
        """Samples were lost."""
        self._samples_dropped.labels(self._model).inc(count)

    def retried(self) -> None:
        """A request went to another replica."""
        self._retries.labels(self._model).inc()

    def routed(self, version: str, outcome: str) -> None:
        """A request of a version ended."""
        self._routed.labels(self._model, version, outcome).inc()

    def finished(
        self, request: GenerateRequest, end: Finished, *, latency_s: float, first_token_s: float, image_s: float
    ) -> None:
        """A request was answered."""
        engine = self.heard(end.stats)
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
            ("image_tokens", request.num_image_tokens),
        ):
            self._tokens[name].labels(self._model, budget, engine).inc(count)
        self._success.labels(self._model, budget, engine, end.reason).inc()

    def heard(self, stats: EngineStats) -> str:
        """A replica said what it does; returns its label."""
        self._forget()
        known = self._replicas.get(stats.engine)
        if known is None:
            taken = {replica.engine for replica in self._replicas.values()}
            known = _Replica(
                next(str(number) for number in range(len(taken) + 1) if str(number) not in taken), 0.0, EngineStats()
            )
            self._replicas[stats.engine] = known
        counted = self._counted_of.get(stats.engine, EngineStats())
        # Two answers may overtake each other.
        if stats.steps >= counted.steps:
            for name, read in _COUNTED.items():
                self._counted[name].labels(self._model, known.engine).inc(max(0, read(stats) - read(counted)))
            self._counted_of[stats.engine] = stats
            # Answers do not carry the time that loading took.
            known.stats = replace(stats, load_s=stats.load_s or known.stats.load_s)
        known.heard = time.monotonic()
        return known.engine

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        self._forget()
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

    def _forget(self) -> None:
        oldest = time.monotonic() - _FORGET_S
        self._replicas = {name: replica for name, replica in self._replicas.items() if replica.heard >= oldest}
