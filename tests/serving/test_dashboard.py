"""Tests that the shipped dashboard queries existing metrics with existing labels."""

import json
import re
from pathlib import Path
from typing import Any

import ray.serve

from parcelray.serving.ingress.metrics import EndpointMetrics

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"parcel:\w+")


def _declared() -> dict[str, set[str]]:
    """Returns the names of the exported metrics with their labels."""
    collectors: list[Any] = list(EndpointMetrics("m").registry._collector_to_names)
    return {name: set(collector._labelnames) for collector in collectors for name in _scraped(collector)}


def _scraped(metric: Any) -> list[str]:
    name = metric._name
    return {
        "histogram": [f"{name}_bucket", f"{name}_sum", f"{name}_count"],
        "counter": [f"{name}_total"],
        "gauge": [name],
    }[metric._type]


def test_every_query_names_an_existing_metric_and_its_labels() -> None:
    declared = _declared()
    queries = _queries()
    queried = {name for query in queries for name in NAME.findall(query)}
    assert queried <= set(declared)
    for query in queries:
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")} - {
            "le"
        }
        for name in NAME.findall(query):
            assert grouped <= declared[name], query
    # Every metric is on the dashboard, except those whose information others contain.
    left = {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count").removesuffix("_total")
        for name in set(declared) - queried
    }
    shown = {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count").removesuffix("_total")
        for name in queried
    }
    assert left - shown == {
        "parcel:request_prompt_tokens",
        "parcel:request_generation_tokens",
        "parcel:request_retries",
    }


def test_every_query_of_ray_names_an_existing_metric() -> None:
    source = "".join(path.read_text() for path in Path(ray.serve.__file__).parent.rglob("*.py"))
    kinds = {name: kind for kind, name in re.findall(r'metrics\.(Counter|Gauge|Histogram)\(\s*"(serve_\w+)"', source)}
    queried = {name for query in _queries() for name in re.findall(r"ray_(\w+)", query)}
    for name in queried:
        bare = next((known for known in kinds if name == _as_scraped(known, kinds[known])), None)
        assert bare is not None, f"ray_{name}"
    wanted = (
        "deployment_processing_latency_ms",
        "replica_processing_queries",
        "deployment_error_counter",
        "replica_startup_latency_ms",
    )
    assert {_as_scraped(f"serve_{name}", kinds[f"serve_{name}"]) for name in wanted} <= queried


def _as_scraped(name: str, kind: str) -> str:
    """Returns the exported name; counters of Ray end with one `_total`."""
    return {"Counter": f"{name.removesuffix('_total')}_total", "Gauge": name, "Histogram": f"{name}_bucket"}[kind]


def _queries() -> list[str]:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "endpoint.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
