"""Frozen parts and low-rank adapters of an elastic model."""

from typing import Any, get_args

import pytest
import torch

from parcelray.config.adaptation import LoraConfig, ModelPart
from parcelray.errors import UserError
from parcelray.models.adapters import add_adapters, freeze_parts, frozen_digest, merge_adapters, part_modules
from parcelray.models.backbones import ElasticVLM
from parcelray.models.mini import build_config, build_model, build_processor
from parcelray.models.mini_llava import build

from .conftest import CONFIG, CORPUS, MINI_LLAVA

PARTS = get_args(ModelPart)


def _model(family: str, connector: str) -> ElasticVLM:
    config: dict[str, Any] = {"type": connector} | ({"num_heads": 4} if connector in ("parcel", "mqt") else {})
    if family == "llava":
        return build(MINI_LLAVA, CORPUS, config, 0)[0].eval()
    made = build_config(CONFIG, build_processor(CONFIG, CORPUS))
    made.connector = config
    return build_model(made, 0).eval()


def _logits(model: ElasticVLM) -> torch.Tensor:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.full((1, 20), model.config.image_token_id)
    ids[:, 16:] = torch.arange(5, 9)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, pixel_values=pixels, num_visual_tokens=16).logits
    return logits


def _all_parts(**changes: Any) -> LoraConfig:
    return LoraConfig.model_validate({part: {"rank": 2} | changes for part in PARTS})


@pytest.mark.parametrize("family", ["paligemma", "llava"])
def test_the_parts_have_every_weight_once(family: str) -> None:
    model = _model(family, "parcel")
    held = [{id(each) for module in part_modules(model, part) for each in module.parameters()} for part in PARTS]
    assert sum(map(len, held)) == len({id(each) for each in model.parameters()})
    for part in PARTS:
        freeze_parts(model, [part])
        assert not any(each.requires_grad for module in part_modules(model, part) for each in module.parameters())
    assert not any(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize(("family", "connector"), [("paligemma", "parcel"), ("paligemma", "mqt"), ("llava", "parcel")])
def test_merged_adapters_give_the_outputs_of_the_adapters(family: str, connector: str) -> None:
    model = _model(family, connector)
    before, names = _logits(model), set(model.state_dict())
    add_adapters(model, _all_parts(alpha=3), seed=0)
    assert torch.equal(_logits(model), before), "new adapters do not change the outputs"
    for part in PARTS:
        adapters = [name for name, each in part_modules(model, part)[0].named_parameters() if each.requires_grad]
        assert adapters
        assert all("lora_" in name for name in adapters)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted = _logits(model)
    assert not torch.allclose(adapted, before, atol=1e-3)
    merge_adapters(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(_logits(model), adapted, atol=1e-4, rtol=1e-4)


def test_each_part_has_its_own_rank_and_targets() -> None:
    model = _model("paligemma", "parcel")
    lora = LoraConfig.model_validate({"decoder": {"rank": 3, "targets": ["q_proj"]}, "tower": {"rank": 5}})
    add_adapters(model, lora, seed=0)
    shapes = {name: each.shape for name, each in model.named_parameters() if "lora_A" in name}
    decoder = {name: shape for name, shape in shapes.items() if "language_model" in name}
    assert {shape[0] for shape in decoder.values()} == {3}
    assert all(".q_proj." in name for name in decoder)
    assert len(decoder) == CONFIG.text_layers
    assert {shape[0] for name, shape in shapes.items() if name not in decoder} == {5}
    assert all(each.requires_grad for each in model.connector.parameters()), "other parts are trained themselves"


def test_adapters_depend_on_the_seed_alone() -> None:
    models = [_model("paligemma", "parcel") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(seed)
        add_adapters(model, _all_parts(), seed)
    first, same, other = (
        {name: each for name, each in model.named_parameters() if "lora_A" in name} for model in models
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("connector", "lora", "message"),
    [
        ("identity", {"connector": {}}, r"training.lora.connector: this model's connector has no linear layers"),
        (
            "parcel",
            {"decoder": {"targets": ["qkv"]}},
            r"targets has 'qkv'; the linear layers of this decoder are down_",
        ),
    ],
)
def test_adapters_without_a_layer_are_refused(connector: str, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_adapters(_model("paligemma", connector), LoraConfig.model_validate(lora), 0)


def test_the_digest_of_frozen_weights_tells_models_apart() -> None:
    model = _model("paligemma", "parcel")
    freeze_parts(model, ["decoder"])
    digest = frozen_digest(model)
    with torch.no_grad():
        next(iter(model.connector.parameters())).add_(1)
        assert frozen_digest(model) == digest
        model.model.language_model.norm.weight.add_(1)
    assert frozen_digest(model) != digest
