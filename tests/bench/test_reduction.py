"""The benches of token reduction: `kmeans` and `overhead` compute their measures from known times."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from parcelray.bench import kmeans as kmeans_bench
from parcelray.bench import overhead as overhead_bench
from parcelray.bench.kmeans import bench_kmeans, photograph_tokens
from parcelray.bench.measure import Measure, PairTiming, Report
from parcelray.bench.overhead import REDUCERS, _break_even, _without_scores, bench_overhead
from parcelray.errors import UserError
from parcelray.models.backbones import ElasticLlavaConfig
from parcelray.models.token_reduction import build_reducer
from parcelray.models.token_reduction.in_decoder import InDecoderReducer
from parcelray.models.token_reduction.kmeans import kmeans


def test_tokens_have_the_structure_of_photographs() -> None:
    tokens = photograph_tokens(2, 64)
    assert tokens.shape == (2, 576, 64)
    assert torch.equal(tokens, photograph_tokens(2, 64))
    # Neighbouring patches of a picture are similar, distant patches are not.
    unit = torch.nn.functional.normalize(tokens - tokens.mean(1, keepdim=True), dim=2)
    neighbours = (unit[:, :-1] * unit[:, 1:]).sum(2).mean()
    distant = (unit[:, :288] * unit[:, 288:]).sum(2).mean()
    assert float(neighbours) > float(distant) + 0.1


def _labels(images: Tensor, num_clusters: int, seed: int, starts: int, *, spoilt: int) -> list[Any]:
    """A clustering like ours from `spoilt` starts on. With fewer starts it puts all tokens into one cluster."""
    labels = [each.numpy().copy() for each in kmeans(images, num_clusters, seed=seed).assignment_BN]
    for each in labels if starts < spoilt else []:
        each[:] = each.max()
    return labels


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, Any]]:
    """The compared libraries: scikit-learn, and what a test adds."""
    known: dict[str, tuple[str, Any]] = {"scikit-learn": ("sklearn", kmeans_bench._scikit_learn)}
    monkeypatch.setattr(kmeans_bench, "_clusterers", lambda: known)
    monkeypatch.setattr(kmeans_bench, "_SEEDS", 2)
    monkeypatch.setattr(kmeans_bench, "_SETTLE_SECONDS", 0)
    monkeypatch.setattr(kmeans_bench, "_PATIENCE_SECONDS", math.inf)
    # Two runs of k-means end in local optima that differ by a few percent, depending on rounding.
    monkeypatch.setattr(kmeans_bench, "_EQUAL", 1.2)
    return known


def _kmeans_rows(**changes: Any) -> tuple[dict[str, list[Measure]], Report]:
    report = bench_kmeans(widths=[32], clusters=[8], batch_sizes=[1, 2], repeats=2, **changes)
    rows: dict[str, list[Measure]] = {}
    for measure in report.measures:
        rows.setdefault(measure.name, []).append(measure)
    return rows, report


def test_kmeans_is_compared_at_equal_inertia(
    baselines: dict[str, tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    baselines |= {"other": ("sklearn", partial(_labels, spoilt=4)), "absent": ("no_such_module", _labels)}

    def clock(call: partial[None]) -> float:
        """Reports 1 s for any batch of ours, and 8 s for two images of another library."""
        call()
        return 8.0 if call.func is kmeans_bench._theirs else 1.0

    monkeypatch.setattr(kmeans_bench, "_seconds", clock)
    rows, report = _kmeans_rows()
    assert "inertia, 576 x 32, k 8" in rows
    assert "other, 4 starts, 576 x 32, k 8: inertia" in rows
    assert "other, 2 starts, 576 x 32, k 8: inertia" not in rows, "only the attempt with equal inertia is timed"
    for batch in (1, 2):
        faster = rows[f"times faster, 576 x 32, k 8, batch {batch}"]
        assert [measure.goal for measure in faster] == [">= 10", ">= 5", ">= 5"]
        assert faster[1].against == "other, 4 starts, the fastest other of equal inertia"
        assert "the fastest other at any inertia" in str(faster[2].against)
        assert [measure.value for measure in faster] == [4 * batch] * 3
        assert [measure.missed for measure in faster] == [True, batch == 1, batch == 1]
    assert report.machine["absent"] == "not installed"
    assert json.loads(report.to_json())["measures"]


def test_without_equal_inertia_the_ratio_is_a_lower_bound(baselines: dict[str, tuple[str, Any]]) -> None:
    baselines["other"] = ("sklearn", partial(_labels, spoilt=99))
    rows, _ = _kmeans_rows()
    assert "other, 4 starts: no other library reaches equal inertia" in str(
        rows["times faster, 576 x 32, k 8, batch 1"][1].against
    )


def test_a_library_that_would_take_minutes_is_reported_as_left_out(
    baselines: dict[str, tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    baselines["torch-kmeans"] = ("sklearn", partial(_labels, spoilt=0))
    monkeypatch.setattr(kmeans_bench, "_TORCH_KMEANS_NUMBERS", 2**10)
    _, report = _kmeans_rows()
    assert "left out" in str(report.machine["torch-kmeans at 576 x 32, k 8"])


def test_kmeans_on_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match="--device tpu is not available"):
        _kmeans_rows(device="tpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the laptop's model by a tiny one with 64 visual tokens."""
    vision = {
        "model_type": "clip_vision_model",
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "head_dim": 12,
    }
    config = ElasticLlavaConfig(
        vision_config=vision | {"num_attention_heads": 2},
        text_config=text | {"num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 512},
        image_token_index=63,
    )
    monkeypatch.setattr(overhead_bench, "_laptop", lambda: config)


def _time_once(a: Callable[[], object], b: Callable[[], object], *_: object, **__: object) -> PairTiming:
    """Runs both and reports 12 ms and 4 ms, because real times depend on the load of the machine."""
    a()
    b()
    return PairTiming(0.012, 0.004, 3, 0, 0, 0)


@pytest.mark.usefixtures("tiny")
def test_overhead_and_savings_follow_from_known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead_bench, "time_pairs", _time_once)
    report = bench_overhead(budgets=[36, 40], batch_sizes=[2], reducers=list(REDUCERS), repeats=1)
    values = {measure.name: measure.value for measure in report.measures}
    assert values["64 -> 36, batch 2: prefill saved"] == pytest.approx(12 - 4)
    # Keys and values, 4 bytes, 4 layers, 1 head of width 12: 384 bytes per token.
    assert values["64 -> 36, batch 2: KV cache saved"] == pytest.approx((64 - 36) * 2 * 384 / 2**20)
    assert values["64 -> 36, batch 2: peak memory of the prefill saved"] > 0
    for name, config in REDUCERS.items():
        inside = build_reducer(config).reads == "prompt"
        # A reduction inside the decoder, or ToMe in the vision tower, replaces a run without reduction. Its time is
        # the difference.
        reduction = 12 - 4 if inside or name == "tome" else 12
        # Prefill and further steps take 12 ms at the full budget and 4 ms at the small one, so the further steps alone
        # save nothing.
        gain = 12 - 4 if inside else 12 - 4 - reduction
        assert values[f"{name}, 64 -> 36, batch 2: reduction"] == pytest.approx(reduction)
        assert values[f"{name}, 64 -> 36, batch 2: net gain"] == pytest.approx(gain)
        assert f"{name}, batch 2: break-even budget" in values
    assert "average_pooling, 64 -> 40, batch 2: net gain" not in values
    assert values["cluster_aggregate, 64 -> 36, batch 2: reduction over prefill saved"] == pytest.approx(
        100 * 12 / (12 - 4)
    )


@pytest.mark.parametrize("name", [name for name, config in REDUCERS.items() if build_reducer(config).reads == "prompt"])
def test_the_baseline_without_scores_keeps_as_many_tokens_at_the_same_layers(name: str) -> None:
    reducer = build_reducer(REDUCERS[name])
    unscored = _without_scores(reducer)
    assert (unscored.positions, unscored.reads) == (reducer.positions, "prompt")
    if isinstance(reducer, InDecoderReducer):
        assert isinstance(unscored, InDecoderReducer)
        assert unscored.stages(12, 576, 300) == reducer.stages(12, 576, 300)
    # It needs no context: there is no prompt.
    assert unscored(torch.randn(2, 16, 4), num_visual_tokens=3).position_ids_BK.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("gains", "expected"), [({64: 8.0, 126: 6.0}, 486.0), ({64: 1.0, 128: -1.0}, 96.0), ({64: -1.0, 128: -2.0}, 0.0)]
)
def test_the_break_even_budget_has_no_net_gain(gains: dict[int, float], expected: float) -> None:
    # At all 576 tokens the reduction costs 1.5 and saves nothing.
    assert _break_even(gains, 576, 1.5) == pytest.approx(expected)


def test_missing_devices_are_refused() -> None:
    for changes, message in (
        ({"device": "tpu"}, "--device tpu is not available"),
        ({"backbone": "llava-1.5-7b"}, "llava-1.5-7b needs a GPU for this bench"),
    ):
        with pytest.raises(UserError, match=message):
            bench_overhead(budgets=[64], batch_sizes=[1], reducers=["tome"], repeats=1, **changes)  # type: ignore[arg-type]


def test_an_unknown_reducer_is_refused() -> None:
    with pytest.raises(UserError, match="--reducers contains unknown names: kmeans; legal: cluster_aggregate, "):
        bench_overhead(budgets=[64], batch_sizes=[1], reducers=["kmeans"], repeats=1)
