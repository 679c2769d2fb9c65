"""The benches of token reduction run, compare what they say they compare, and can miss their goals."""

import json

import pytest
import torch

from parcelray.config.model import MiniModelConfig
from parcelray.errors import UserError
from parcelray.profiling import overhead_bench
from parcelray.profiling.kmeans_bench import bench_kmeans, photograph_tokens
from parcelray.profiling.overhead_bench import bench_overhead


def test_tokens_have_the_structure_of_pictures() -> None:
    tokens = photograph_tokens(2, 64)
    assert tokens.shape == (2, 576, 64)
    assert torch.equal(tokens, photograph_tokens(2, 64))
    # Neighbours in a picture are alike, far patches are not.
    unit = torch.nn.functional.normalize(tokens - tokens.mean(1, keepdim=True), dim=2)
    beside = (unit[:, :-1] * unit[:, 1:]).sum(2).mean()
    far = (unit[:, :288] * unit[:, 288:]).sum(2).mean()
    assert float(beside) > float(far) + 0.1


def test_kmeans_is_measured_beside_scikit_learn() -> None:
    report = bench_kmeans(widths=[32], clusters=[8], batch_sizes=[1, 2], repeats=1)
    names = [measure.name for measure in report.measures]
    assert "inertia, 576 x 32, k 8" in names
    assert "ours, 576 x 32, k 8, batch 2" in names
    against = {measure.against for measure in report.measures if measure.name == "times faster, 576 x 32, k 8, batch 1"}
    assert "scikit-learn" in against
    goals = {measure.goal for measure in report.measures if measure.name.startswith("times faster") and measure.against == "scikit-learn"}
    assert goals == {">= 10"}
    assert json.loads(report.to_json())["measures"]


def test_the_overhead_is_measured_against_what_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = MiniModelConfig(
        image_size=96, vision_width=24, vision_layers=1, vision_heads=2, vision_mlp_width=32, text_width=24, text_layers=2, text_heads=2, text_kv_heads=1,
        text_head_dim=12, text_mlp_width=32,
    )  # fmt: skip
    monkeypatch.setattr(overhead_bench, "_DECODER", tiny)
    report = bench_overhead(budgets=[64, 50], batch_sizes=[2], reducers=["cluster_aggregate", "average_pooling"], repeats=1)
    values = {measure.name: measure.value for measure in report.measures}
    # Keys and values, 4 bytes, 2 layers, 1 head of 12: 192 bytes a token.
    assert values["576 -> 64, batch 2: KV cache saved"] == pytest.approx((576 - 64) * 2 * 192 / 2**20)
    assert values["cluster_aggregate, 576 -> 50, batch 2: reduction"] > 0
    assert "average_pooling, 576 -> 64, batch 2: net gain" in values
    assert "average_pooling, 576 -> 50, batch 2: net gain" not in values
    share = values["cluster_aggregate, 576 -> 64, batch 2: reduction over prefill saved"]
    assert share == pytest.approx(100 * values["cluster_aggregate, 576 -> 64, batch 2: reduction"] / values["576 -> 64, batch 2: prefill saved"])


def test_an_unknown_reducer_is_refused() -> None:
    with pytest.raises(UserError, match="--reducers names kmeans; legal: cluster_aggregate, "):
        bench_overhead(budgets=[64], batch_sizes=[1], reducers=["kmeans"], repeats=1)
