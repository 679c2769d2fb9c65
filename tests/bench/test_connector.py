"""`parcelray bench connector`, at a shape that takes milliseconds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parcelray.bench import connector as connector_bench
from parcelray.bench.connector import CONNECTOR_CONFIGS, bench_connectors
from parcelray.bench.measure import PairTiming
from parcelray.config.model import MiniModelConfig
from parcelray.errors import UserError
from parcelray.models.backbones import ElasticPaliGemmaConfig


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> str:
    dims = MiniModelConfig()
    config = ElasticPaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 48,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": dims.image_size,
            "patch_size": dims.patch_size,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma2",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 64,
            "attn_logit_softcapping": None,
        },
        projection_dim=32,
        hidden_size=32,
        vocab_size=64,
        image_token_index=63,
        connector={"type": "parcel"},
    )
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_every_connector_is_measured_at_its_supported_budgets(
    tiny_checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_once(alone: Callable[[], object], whole: Callable[[], object], *_: object, **__: object) -> PairTiming:
        """Runs both and reports 2 ms and 8 ms, because real times depend on the load of the machine."""
        alone()
        whole()
        return PairTiming(0.002, 0.008, 0.25, 0.001, 0.001, 0.01)

    monkeypatch.setattr(connector_bench, "time_pairs", time_once)
    report = bench_connectors(tiny_checkpoint, budgets=(16, 100, 256))
    values = {measure.name: measure.value for measure in report.measures}
    measured = {name.split(":")[0] for name in values}
    assert {config.type for config in CONNECTOR_CONFIGS} == {name.split(" ")[0] for name in measured}
    assert "parcel at 100 tokens" in measured
    assert "m3 at 100 tokens" not in measured
    assert "identity at 16 tokens" not in measured
    for label in measured:
        assert [values[f"{label}: {what}"] for what in ("time", "time of the whole prefill", "share of the time")] == [
            2,
            8,
            25,
        ]
        assert values[f"{label}: peak memory"] < values[f"{label}: peak memory of the whole prefill"]
    assert values["identity at 256 tokens: peak memory"] == 0
    assert values["parcel at 256 tokens: peak memory"] > values["m3 at 16 tokens: peak memory"] > 0


def test_the_setting_is_part_of_the_report(tiny_checkpoint: str) -> None:
    content = json.loads(bench_connectors(tiny_checkpoint, budgets=(4,), batch_size=2, repeats=1).to_json())
    assert content["machine"]["batch_size"] == 2
    assert content["machine"]["device"] == "cpu"
    assert content["machine"]["dtype"] == "float32"
    assert {measure["unit"] for measure in content["measures"]} == {"ms", "MB", "%"}


def test_illegal_options_are_refused(tiny_checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="Unknown device 'tpu'"):
        bench_connectors(tiny_checkpoint, budgets=(16,), device="tpu")
    with pytest.raises(UserError, match="No CUDA device"):
        bench_connectors(tiny_checkpoint, budgets=(16,), device="cuda")
    with pytest.raises(UserError, match="needs a GPU"):
        bench_connectors("paligemma2-3b", budgets=(16,))
    with pytest.raises(UserError, match="repeats 0"):
        bench_connectors(tiny_checkpoint, budgets=(16,), repeats=0)
    with pytest.raises(
        UserError, match="No connector supports 300 visual tokens for 256 patches; legal budgets are 1 to 256"
    ):
        bench_connectors(tiny_checkpoint, budgets=(300,))


@pytest.mark.gpu
@pytest.mark.parametrize("resolution", [224, 448])
def test_the_real_shape_on_a_gpu(resolution: int) -> None:
    report = bench_connectors("paligemma2-3b", budgets=(64, 256), repeats=3, device="cuda", resolution=resolution)
    shares = [measure.value for measure in report.measures if measure.unit == "%"]
    assert all(0 < share < 100 for share in shares)
    assert report.machine["dtype"] == "bfloat16"
