"""`parcelray bench serve`: compares the endpoint with offline generation, a plain server, and fixed budgets.

All comparisons run alternately on one machine in one run, with the clients on the same cores. The model has random
weights. One request with all visual tokens takes 100 ms or more on a laptop core, and vision tower and decoder have the
proportion of PaliGemma-2 3B. Answers end at `max_tokens`, because random weights do not produce an end token.
"""

import asyncio
import base64
import io
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from ray import serve

from parcelray.bench.load_generator import LoadResult, closed_loop, open_loop
from parcelray.bench.measure import Measure, Report, interquartile_range, machine_info
from parcelray.bench.plain_server import PlainServer
from parcelray.bench.workload import photographs
from parcelray.config.connector import M3ConnectorConfig
from parcelray.config.model import MiniModelConfig
from parcelray.config.serve import ServeJob
from parcelray.datasets.images import decode_image
from parcelray.datasets.mini.suite import MiniSuite
from parcelray.datasets.sample import Sample
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.mini import build_config, build_model, build_processor, save_checkpoint
from parcelray.models.vlm import use_sdpa_where_exact
from parcelray.serving.app import replica_settings
from parcelray.serving.deployments import deploy
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import PromptBuilder, Sampling, last_event
from parcelray.serving.ingress.clients import LocalClient
from parcelray.serving.plan import pin
from parcelray.serving.run import endpoint

OFFLINE_GOAL = ">= 0.85"
PLAIN_GOAL = ">= 2"
OVERHEAD_GOAL = "<= 15"
LOAD_GOAL = ">= 1.5"
BUDGETS = (16, 64, 256)
_FULL = max(BUDGETS)
MODEL = MiniModelConfig(
    vision_width=192,
    vision_layers=4,
    vision_mlp_width=768,
    text_width=512,
    text_layers=6,
    text_heads=8,
    text_kv_heads=2,
    text_head_dim=64,
    text_mlp_width=2048,
)
_CHAT = "/v1/chat/completions"
_CLIMB = 1.2
"""Factor from one request rate of the open loop to the next."""
_QUESTION = "what color is the small circle"


class _Bench:
    """The model, job and requests of the bench."""

    def __init__(self, folder: Path, model: MiniModelConfig, *, port: int, threads: int, device: str) -> None:
        self.processor: ElasticProcessor = build_processor(model, MiniSuite("train").texts(2000))
        config = build_config(model, self.processor)
        config.connector = M3ConnectorConfig().model_dump(mode="json")
        self.model: ElasticVLM = build_model(config, 0)
        self.model.eval()
        use_sdpa_where_exact(self.model)
        save_checkpoint(self.model, self.processor, folder)
        self.model.to(device)
        self.folder, self.image_size, self.port, self.threads, self.device = (
            folder,
            model.image_size,
            port,
            threads,
            device,
        )
        self._numbers = itertools.count()

    def job(self, policy: dict[str, Any] | None = None) -> ServeJob:
        """Returns the job of the endpoint. The feature cache is off, because every request has a new image."""
        return ServeJob.model_validate(
            {
                "kind": "serve",
                "name": "bench",
                "model": {"reference": str(self.folder), "device": self.device},
                "budgets": {"offered": BUDGETS, "policy": policy or {"type": "request"}},
                # As many prompt tokens per step as the offline batch: 32 prompts with all visual tokens.
                "engine": {"max_running": 32, "max_waiting": 480, "feature_cache_mb": 0, "prefill_tokens": 16384},
                "replicas": {"threads": self.threads, "gpus": 0.5 if self.device == "cuda" else 0},
                "http": {"port": self.port},
                "tracking": {"uri": None},
            }
        )

    def image(self) -> bytes:
        """Returns a new image, encoded as PNG."""
        pixels = photographs(1, self.image_size, seed=next(self._numbers))[0]
        buffer = io.BytesIO()
        scaled = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
        Image.fromarray(scaled.permute(1, 2, 0).to(torch.uint8).numpy()).save(buffer, "PNG")
        return buffer.getvalue()

    def body(self, budget: int | str, max_tokens: int, **more: object) -> bytes:
        """Returns the body of a request with a new image."""
        url = "data:image/png;base64," + base64.b64encode(self.image()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": _QUESTION}]
        body = {
            "model": "bench",
            "messages": [{"role": "user", "content": content}],
            "visual_tokens": budget,
            "max_tokens": max_tokens,
        }
        return json.dumps(body | more).encode()

    def samples(self, count: int) -> list[Sample]:
        """Returns samples like the requests, for offline generation."""
        return [
            Sample(
                id=str(index),
                benchmark="bench",
                family="f",
                task="t",
                images=(self.image(),),
                prompt=_QUESTION,
                answers=("",),
                scene=str(index),
            )
            for index in range(count)
        ]


def bench_serving(
    *,
    requests: int,
    repeats: int,
    port: int = 18462,
    threads: int | None = None,
    device: str = "cpu",
    load_seconds: float = 25.0,
    model: MiniModelConfig = MODEL,
) -> Report:
    """Runs all comparisons.

    Args:
        requests: number of requests per load with 32 clients. Below 100, the start and end of the load dominate, where
            not all clients are busy.
        repeats: number of rounds of each comparison.
        port: port of the endpoint.
        threads: number of threads of the model, in every comparison; None: torch's default.
        device: device of the model, in every comparison.
        load_seconds: length of each open loop in seconds.
        model: shape of the model.
    """
    measures: list[Measure] = []
    with tempfile.TemporaryDirectory(prefix="parcelray-bench-") as name:
        before = torch.get_num_threads()
        num_threads = threads or before
        torch.set_num_threads(num_threads)
        try:
            bench = _Bench(Path(name) / "model", model, port=port, threads=num_threads, device=device)
            with endpoint(pin(bench.job())) as url:
                measures += _one_request(bench, url, repeats)
                measures += _against_offline(bench, url, requests, repeats)
                measures += _by_concurrency(bench, url, requests)
                with _plain(bench) as plain_url:
                    measures += _against_plain(bench, url, plain_url, requests, repeats)
                measures += _load_policy(bench, url, load_seconds)
        finally:
            torch.set_num_threads(before)
    return Report(tuple(measures), {**machine_info(), "threads": num_threads, "requests": requests, "device": device})


def _one_request(bench: _Bench, url: str, repeats: int) -> list[Measure]:
    """Measures the overhead of HTTP, ingress and replica call per request, at the smallest and the largest budget."""
    measures: list[Measure] = []
    engine = ContinuousEngine(bench.model, bench.processor)
    client, prompts = LocalClient(engine), PromptBuilder(bench.processor)
    try:
        with asyncio.Runner() as runner:
            for budget in (min(BUDGETS), _FULL):
                local, remote = [], []
                for _ in range(max(20, 10 * repeats)):
                    local.append(runner.run(_in_process(bench, prompts, client, budget)))
                    remote.append(closed_loop(url + _CHAT, [bench.body(budget, 4)], clients=1).latencies_s[0])
                added = [(b - a) * 1000 for a, b in zip(local, remote, strict=True)]
                name = f"one request in process, {budget} tokens"
                measures.append(Measure(name, statistics.median(local) * 1000, "ms", interquartile_range(local) * 1000))
                name = f"overhead of the endpoint, {budget} tokens"
                measures.append(
                    Measure(
                        name, statistics.median(added), "ms", interquartile_range(added), OVERHEAD_GOAL, "in process"
                    )
                )
    finally:
        engine.close()
    return measures


async def _in_process(bench: _Bench, prompts: PromptBuilder, client: LocalClient, budget: int) -> float:
    """Returns the seconds from the encoded image to the answer, without HTTP."""
    data = bench.image()
    started = time.perf_counter()
    pixels = prompts.pixels(decode_image(data))
    request = prompts.request(
        "r", _QUESTION, [pixels], num_visual_tokens=budget, sampling=Sampling(max_new_tokens=4), timeout_s=60
    )
    await last_event(client.events(request))
    return time.perf_counter() - started


def _against_offline(bench: _Bench, url: str, requests: int, repeats: int) -> list[Measure]:
    """Compares 32 clients at the largest budget with `generate` in batches of 32, for the same number of questions."""
    predictor = Predictor(bench.model, bench.processor, batch_size=32, settings=GenerationSettings(max_new_tokens=8))
    offline, served = [], []
    for _ in range(repeats):
        samples, bodies = bench.samples(requests), [bench.body(_FULL, 8) for _ in range(requests)]
        started = time.perf_counter()
        predictor.generate(samples, num_visual_tokens=_FULL)
        offline.append(requests / (time.perf_counter() - started))
        served.append(_load(url, bodies, 32).rate)
    ratio = _ratio("endpoint over offline", served, offline, OFFLINE_GOAL, "offline batches")
    return [
        _rate("offline batches of 32, 256 tokens", offline),
        _rate("endpoint, 32 clients, 256 tokens", served),
        ratio,
    ]


def _by_concurrency(bench: _Bench, url: str, requests: int) -> list[Measure]:
    measures = []
    for budget in BUDGETS:
        for clients in (1, 8, 32):
            count = max(clients, requests * min(clients, 16) // 32)
            result = _load(
                url,
                [bench.body(budget, 8, stream=True, stream_options={"include_usage": True}) for _ in range(count)],
                clients,
            )
            name = f"{budget} tokens, {clients} clients"
            measures.append(Measure(f"{name}: throughput", result.rate, "1/s"))
            for share in (50, 95, 99):
                measures.append(
                    Measure(f"{name}: first token, p{share}", result.first_token_quantile(share / 100) * 1000, "ms")
                )
                measures.append(Measure(f"{name}: whole answer, p{share}", result.quantile(share / 100) * 1000, "ms"))
    return measures


def _against_plain(bench: _Bench, url: str, plain_url: str, requests: int, repeats: int) -> list[Measure]:
    """Compares the endpoint with the plain server: 32 clients, mixed budgets and lengths, the same bodies."""
    ours, plain = [], []
    for repeat in range(repeats):
        rng = random.Random(repeat)
        bodies = [bench.body(rng.choice(BUDGETS), rng.choice((2, 4, 8, 16, 32, 64))) for _ in range(requests)]
        plain.append(_load(plain_url, bodies, 32).rate)
        ours.append(_load(url, bodies, 32).rate)
    ratio = _ratio("endpoint over plain server", ours, plain, PLAIN_GOAL, "FastAPI + generate + @serve.batch")
    return [_rate("plain server, mixed", plain), _rate("endpoint, mixed", ours), ratio]


def _load_policy(bench: _Bench, url: str, load_seconds: float) -> list[Measure]:
    """Compares the highest request rate within the p95 objective: at the largest budget, and with budgets by load."""
    alone = _load(url, [bench.body(_FULL, 4) for _ in range(8)], 1).quantile(0.5)
    objective = 10 * alone
    fixed = _highest_rate(bench, url, _FULL, alone, load_seconds)
    deploy(
        pin(
            bench.job(
                {
                    "type": "load",
                    "objective_s": objective * 0.7,
                    "window_s": 2.0,
                    "lower_after_s": 0.3,
                    "raise_after_s": 3.0,
                }
            )
        )
    )
    by_load = _highest_rate(bench, url, "auto", alone, load_seconds)
    measures = [
        Measure("objective: p95 of the whole request", objective * 1000, "ms"),
        Measure("highest rate at the objective, 256 tokens", fixed.rate, "1/s"),
        Measure("highest rate at the objective, by load", by_load.rate, "1/s"),
        Measure(
            "by load over fixed",
            by_load.rate / fixed.rate if fixed.rate else float("nan"),
            "ratio",
            None,
            LOAD_GOAL,
            "256 tokens",
        ),
    ]
    total = by_load.budgets.total()
    return measures + [
        Measure(f"by load, share of {budget} tokens", by_load.budgets[str(budget)] / max(1, total), "")
        for budget in BUDGETS
    ]


@dataclass(frozen=True)
class _Sustained:
    """The highest request rate of an open loop that meets the latency objective."""

    rate: float
    """Requests sent per second; 0: no rate meets the objective."""
    budgets: Counter[str]
    """Number of its responses by budget."""


def _highest_rate(bench: _Bench, url: str, budget: int | str, alone_s: float, load_seconds: float) -> _Sustained:
    """Raises the rate from half of one client's rate, until p95 exceeds ten times the latency alone twice in a row.

    Args:
        bench: the bench.
        url: URL of the endpoint.
        budget: visual tokens per image, or `auto`.
        alone_s: median latency of a single client, in seconds.
        load_seconds: length of each load in seconds.
    """
    rate, misses, best = 0.5 / alone_s, 0, _Sustained(0.0, Counter())
    while misses < 2:
        bodies = [bench.body(budget, 4) for _ in range(max(20, int(rate * load_seconds)))]
        result = open_loop(url + _CHAT, bodies, rate=rate, seed=int(rate * 1000))
        if result.failed == 0 and result.quantile(0.95) <= 10 * alone_s:
            best, misses = _Sustained(rate, result.budgets), 0
        else:
            misses += 1
        rate *= _CLIMB
    return best


@contextmanager
def _plain(bench: _Bench) -> Iterator[str]:
    """Deploys the plain server next to the endpoint. Each is idle while the other is measured."""
    deployment: Any = serve.deployment(name="Plain", max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.1})(
        serve.ingress()(PlainServer)
    )
    pinned = pin(bench.job())
    serve.run(
        deployment.bind(replica_settings(pinned.job, pinned.job.model, pinned.champion)),
        name="plain",
        route_prefix="/plain",
    )
    yield f"http://127.0.0.1:{bench.port}/plain"
    serve.delete("plain")


def _load(url: str, bodies: Sequence[bytes], clients: int) -> LoadResult:
    result = closed_loop(url + _CHAT, bodies, clients=clients)
    assert result.failed == 0, f"requests of the bench failed: {dict(result.statuses)}"
    return result


def _ratio(name: str, ours: list[float], theirs: list[float], goal: str, against: str) -> Measure:
    """Measures the median and spread of the ratios per round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Measure(name, statistics.median(ratios), "ratio", interquartile_range(ratios), goal, against)


def _rate(name: str, values: list[float]) -> Measure:
    return Measure(name, statistics.median(values), "1/s", interquartile_range(values))
