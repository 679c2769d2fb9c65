"""Metrics of one ingress, by the names that dashboards of serving engines know, with the visual-token budget as a label.

Ray's own metrics (queues, replicas, autoscaling) come from Ray's port; these are what only the endpoint sees. Histograms count finished
requests; gauges are what the replicas said with their last answer.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from parcelray.serving.engine import EngineStats, Finished, GenerateRequest

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_FORGET_S = 60.0
"""A replica that has not answered for so long is left out of the gauges."""


class EndpointMetrics:
    """Counts what one ingress does.

    Args:
        model_name: label of every metric.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._replicas: dict[str, tuple[float, EngineStats]] = {}
        by_budget = ["model_name", "visual_tokens"]

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"parcel:{name}", text, by_budget, buckets=buckets, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"parcel:{name}", text, ["model_name", "engine"], registry=self.registry)

        self._histograms = {
            "time_to_first_token_seconds": histogram("time_to_first_token_seconds", "From arrival at the ingress to the first token"),
            "e2e_request_latency_seconds": histogram("e2e_request_latency_seconds", "From arrival at the ingress to the end of the answer"),
            "request_queue_time_seconds": histogram("request_queue_time_seconds", "From arrival at the engine to the start of the prefill"),
            "request_prefill_time_seconds": histogram("request_prefill_time_seconds", "Of the prefill batch"),
            "request_decode_time_seconds": histogram("request_decode_time_seconds", "From the first token to the last"),
            "inter_token_latency_seconds": histogram("inter_token_latency_seconds", "Mean time between two tokens of a request"),
            "vision_encode_seconds": histogram("vision_encode_seconds", "Of the vision tower's batch"),
            "image_decode_seconds": histogram("image_decode_seconds", "Decoding and scaling of a request's images"),
            "request_prompt_tokens": histogram("request_prompt_tokens", "Prompt tokens, visual ones included", _TOKENS),
            "request_generation_tokens": histogram("request_generation_tokens", "New tokens", _TOKENS),
        }
        self._tokens = {
            name: Counter(f"parcel:{name}", text, by_budget, registry=self.registry)
            for name, text in (("prompt_tokens", "Prompt tokens"), ("generation_tokens", "New tokens"), ("image_tokens", "Visual tokens"))
        }
        self._success = Counter("parcel:request_success", "Answers", [*by_budget, "finished_reason"], registry=self.registry)
        self._rejected = Counter("parcel:requests_rejected", "Refused requests", ["model_name", "reason"], registry=self.registry)
        self._decisions = Counter("parcel:budget_decisions", "Budgets given to requests", [*by_budget, "asked"], registry=self.registry)
        self._retries = Counter("parcel:request_retries", "Requests sent to another replica", ["model_name"], registry=self.registry)
        self._routed = Counter("parcel:requests_routed", "Requests by model version and outcome", ["model_name", "version", "outcome"], registry=self.registry)
        self._auto = Gauge("parcel:auto_visual_tokens", "Budget that requests get now that leave it open", ["model_name"], registry=self.registry)
        self._gauges = {
            "num_requests_running": gauge("num_requests_running", "Requests that share decode steps"),
            "num_requests_waiting": gauge("num_requests_waiting", "Requests in the engine's queue"),
            "kv_cache_usage_perc": gauge("kv_cache_usage_perc", "Reserved share of the KV cache, 0 to 1"),
            "feature_cache_hits": gauge("feature_cache_hits", "Images that skipped the vision tower"),
            "feature_cache_queries": gauge("feature_cache_queries", "Images that were looked up"),
            "rows_per_decode_step": gauge("rows_per_decode_step", "Requests that shared a decode step, mean since the start"),
        }

    def decided(self, asked: int | str, budget: int) -> None:
        """A request got a budget."""
        self._decisions.labels(self._model, budget, asked if isinstance(asked, str) else "tokens").inc()

    def auto_budget(self, budget: int) -> None:
        """What the policy gives to requests that leave it open."""
        self._auto.labels(self._model).set(budget)

    def rejected(self, reason: str) -> None:
        """A request was refused; `reason` is one of the error codes."""
        self._rejected.labels(self._model, reason).inc()

    def retried(self) -> None:
        """A request went to another replica."""
        self._retries.labels(self._model).inc()

    def routed(self, version: str, outcome: str) -> None:
        """A request of a version ended."""
        self._routed.labels(self._model, version, outcome).inc()

    def finished(self, request: GenerateRequest, end: Finished, *, latency_s: float, first_token_s: float, image_s: float, replica: str) -> None:
        """A request was answered."""
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
            self._histograms[name].labels(self._model, budget).observe(value)
        for name, count in (
            ("prompt_tokens", request.num_prompt_tokens),
            ("generation_tokens", end.num_new_tokens),
            ("image_tokens", request.num_image_tokens),
        ):
            self._tokens[name].labels(self._model, budget).inc(count)
        self._success.labels(self._model, budget, end.reason).inc()
        self._replicas[replica] = (time.monotonic(), end.stats)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        oldest = time.monotonic() - _FORGET_S
        self._replicas = {name: entry for name, entry in self._replicas.items() if entry[0] >= oldest}
        for gauge in self._gauges.values():
            gauge.clear()
        for name, (_, stats) in self._replicas.items():
            values = {
                "num_requests_running": stats.running,
                "num_requests_waiting": stats.waiting,
                "kv_cache_usage_perc": stats.kv_tokens_used / max(1, stats.kv_tokens_total),
                "feature_cache_hits": stats.feature_cache_hits,
                "feature_cache_queries": stats.feature_cache_hits + stats.feature_cache_misses,
                "rows_per_decode_step": stats.decoded_rows / max(1, stats.steps),
            }
            for key, value in values.items():
                self._gauges[key].labels(self._model, name).set(value)
        return generate_latest(self.registry)
