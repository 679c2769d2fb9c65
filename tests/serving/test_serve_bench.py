"""`parcelray bench serve` runs to its end at a small size: every comparison is there, with its goal, and nothing failed."""

import socket

import pytest

from parcelray.cluster import serve_bench
from parcelray.config.model import MiniModelConfig

pytestmark = [
    pytest.mark.serving,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
SMALL = MiniModelConfig(
    vision_width=24, vision_layers=1, vision_heads=2, vision_mlp_width=32, text_width=24, text_layers=1, text_heads=2, text_head_dim=12, text_mlp_width=32
)


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
    ratio = found["endpoint, 32 clients, 256 tokens"].value / found["offline batches of 32, 256 tokens"].value
    assert found["endpoint over offline"].value == pytest.approx(ratio)
    for budget in (16, 64, 256):
        for clients in (1, 8, 32):
            name = f"{budget} tokens, {clients} clients"
            assert found[f"{name}: throughput"].value > 0
            for share in (50, 95, 99):
                assert 0 < found[f"{name}: first token, p{share}"].value <= found[f"{name}: whole answer, p{share}"].value
    assert sum(found[f"by load, share of {budget} tokens"].value for budget in (16, 64, 256)) == pytest.approx(1)
