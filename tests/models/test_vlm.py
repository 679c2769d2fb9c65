"""The elastic model compared with the stock transformers class, and used through transformers' own interfaces."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PaliGemmaForConditionalGeneration

from parcelray.config.connector import ConnectorConfig, M3ConnectorConfig, MqtConnectorConfig, ParcelConnectorConfig
from parcelray.config.model import MiniModelConfig
from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor as Processor
from parcelray.models.mini import build_config, build_model, build_processor, save_checkpoint
from parcelray.models.vlm import config_of, load_vlm, write_converted

from .conftest import CONFIG, CORPUS, random_images, write_stock_paligemma

PROMPTS = ["what color is the circle", "how many"]


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory: pytest.TempPathFactory, processor: Processor) -> Path:
    """A stock PaliGemma-2 checkpoint with random weights, in the layout of the hub.

    It has shards, an index, and the key names of the original release.
    """
    return write_stock_paligemma(tmp_path_factory.mktemp("stock"), processor)


@pytest.mark.parametrize("connector", [None, ParcelConnectorConfig(num_heads=4)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_data_type_is_that_of_the_caller_not_that_of_the_files(
    tmp_path: Path, processor: Processor, stored: torch.dtype, connector: ConnectorConfig | None
) -> None:
    folder = write_stock_paligemma(tmp_path / "stock", processor, stored)
    assert {value.dtype for value in load_file(next(folder.glob("*.safetensors"))).values()} == {stored}
    for model, dtype in (
        (load_vlm(folder, connector=connector), torch.float32),
        (load_vlm(folder, connector=connector, dtype=torch.bfloat16), torch.bfloat16),
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert {part.dtype for part in (model.config, model.config.text_config, model.config.vision_config)} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_converted_checkpoint_has_the_rounded_weights(tmp_path: Path, stock_folder: Path, dtype: torch.dtype) -> None:
    write_converted(stock_folder, tmp_path / "converted", dtype)
    original, converted = load_vlm(stock_folder), load_vlm(tmp_path / "converted", dtype=dtype)
    config = json.loads((tmp_path / "converted" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    for file in (tmp_path / "converted").glob("*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {dtype}
    for (name, exact), (_, rounded) in zip(original.named_parameters(), converted.named_parameters(), strict=True):
        assert torch.equal(exact.to(dtype), rounded), name


def _inputs(processor: Processor, budget: int, images_per_prompt: int = 1) -> dict[str, Tensor]:
    images = [random_images(images_per_prompt, seed=index) for index in range(len(PROMPTS))]
    return dict(processor(images=images, text=PROMPTS, num_visual_tokens=budget, return_tensors="pt", padding=True))


def test_the_stock_folder_has_the_hubs_key_names(stock_folder: Path) -> None:
    with safe_open(stock_folder / "model-00002-of-00002.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in keys
    assert "multi_modal_projector.linear.weight" in keys


@pytest.mark.parametrize("num_visual_tokens", [None, 256])
def test_identity_at_the_full_budget_is_the_stock_model_exactly(
    stock_folder: Path, processor: Processor, num_visual_tokens: int | None
) -> None:
    stock = PaliGemmaForConditionalGeneration.from_pretrained(stock_folder).eval()
    elastic = load_vlm(stock_folder).eval()
    inputs = _inputs(processor, 256)
    with torch.no_grad():
        assert torch.equal(elastic(**inputs, num_visual_tokens=num_visual_tokens).logits, stock(**inputs).logits)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        elastic.generate(**inputs, num_visual_tokens=num_visual_tokens, **greedy), stock.generate(**inputs, **greedy)
    )


def test_the_configuration_of_a_stock_folder_is_read_without_a_warning(
    stock_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The loggers of transformers do not pass their messages on to the root logger.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    assert config_of(stock_folder).connector_config.type == "identity"
    assert not caplog.records


def test_identity_trains_as_the_stock_model_exactly(stock_folder: Path, processor: Processor) -> None:
    stock = PaliGemmaForConditionalGeneration.from_pretrained(stock_folder)
    elastic = load_vlm(stock_folder)
    batch = processor(
        images=[random_images(1), random_images(1, 1)],
        text=PROMPTS,
        suffix=["red", "blue 47"],
        return_tensors="pt",
        padding=True,
    )
    first, second = stock(**batch), elastic(**batch, num_visual_tokens=256)
    first.loss.backward()
    second.loss.backward()
    assert torch.equal(first.loss, second.loss)
    name = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    expected, result = stock.model.get_parameter(name).grad, elastic.model.get_parameter(name).grad
    assert expected is not None
    assert result is not None
    assert torch.equal(expected, result)


@pytest.mark.parametrize(
    "connector", [ParcelConnectorConfig(num_heads=4), MqtConnectorConfig(num_heads=4), M3ConnectorConfig()]
)
def test_a_connector_survives_save_and_load(
    tmp_path: Path, stock_folder: Path, processor: Processor, connector: ConnectorConfig
) -> None:
    model = load_vlm(stock_folder, connector=connector, seed=1).eval()
    inputs = _inputs(processor, 64)
    with torch.no_grad():
        expected = model(**inputs, num_visual_tokens=64).logits
    save_checkpoint(model, processor, tmp_path)
    for loaded in (load_vlm(tmp_path).eval(), AutoModelForImageTextToText.from_pretrained(tmp_path).eval()):
        assert isinstance(loaded, ElasticVLM)
        assert loaded.connector.name == connector.type
        with torch.no_grad():
            assert torch.equal(loaded(**inputs, num_visual_tokens=64).logits, expected)


def test_a_connector_inserted_into_a_checkpoint_has_the_initial_values_of_its_start(stock_folder: Path) -> None:
    """Loading initialises new modules again, in its own order, which must not replace the values of the connector."""
    local = load_vlm(stock_folder, connector=ParcelConnectorConfig(num_heads=4)).connector
    path = local.get_submodule("query_path")
    weights = path.state_dict()
    width = local.hidden_size
    for name in ("cross_attention.attention.v_proj", "cross_attention.attention.out_proj"):
        torch.testing.assert_close(weights[f"{name}.weight"], torch.eye(width))
    for name in ("cross_attention.mlp.down_proj", "conditioner.block.attention.out_proj"):
        assert not weights[f"{name}.weight"].any()
    xavier = (2 / (width + width)) ** 0.5
    assert float(weights["cross_attention.attention.q_proj.weight"].std()) == pytest.approx(0.1 * xavier, rel=0.2)
    random = load_vlm(stock_folder, connector=ParcelConnectorConfig(num_heads=4, start="random")).connector
    weight = random.state_dict()["query_path.cross_attention.attention.v_proj.weight"]
    assert float(weight.std()) == pytest.approx(xavier, rel=0.1)


def test_a_new_connector_is_seeded_and_starts_at_the_scale_of_the_text_embeddings(
    stock_folder: Path, processor: Processor
) -> None:
    first, again, other = (
        load_vlm(stock_folder, connector=ParcelConnectorConfig(num_heads=4), seed=seed) for seed in (5, 5, 6)
    )
    states = [model.connector.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


@pytest.mark.parametrize(
    "connector", [None, ParcelConnectorConfig(num_heads=4), MqtConnectorConfig(num_heads=4), M3ConnectorConfig()]
)
def test_visual_tokens_start_at_the_scale_of_the_text_embeddings(
    processor: Processor, connector: ConnectorConfig | None
) -> None:
    config = build_config(CONFIG, processor)
    config.connector = connector.model_dump(mode="json") if connector is not None else None
    model = build_model(config, 0)
    inputs = _inputs(processor, 256)
    with torch.no_grad():
        tokens = model.model.compress(model.model.encode_patches(inputs["pixel_values"]), num_visual_tokens=256)
        text = model.get_input_embeddings()(torch.arange(config.text_config.vocab_size))
    assert 0.5 < float(tokens.std() / text.std()) < 2


@pytest.mark.parametrize("budget", [16, 40, 64, 256])
def test_the_decoder_gets_as_many_visual_tokens_as_the_budget(
    elastic: ElasticVLM, processor: Processor, budget: int
) -> None:
    inputs = _inputs(processor, budget)
    output = elastic(**inputs, num_visual_tokens=budget)
    assert output.image_hidden_states.shape[:2] == (2, budget)
    assert output.logits.shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("num_images", [2, 4])
def test_each_image_of_a_prompt_gets_the_budget(elastic: ElasticVLM, processor: Processor, num_images: int) -> None:
    inputs = _inputs(processor, 16, num_images)
    assert int((inputs["input_ids"][0] == elastic.config.image_token_id).sum()) == 16 * num_images
    tokens = elastic.generate(**inputs, num_visual_tokens=16, max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


def test_the_order_of_the_images_matters(elastic: ElasticVLM, processor: Processor) -> None:
    pair = random_images(2)
    logits = [
        elastic(
            **processor(images=[order], text=["which"], num_visual_tokens=16, return_tensors="pt"), num_visual_tokens=16
        ).logits[:, -1]
        for order in (pair, pair[::-1])
    ]
    assert not torch.allclose(*logits)


def test_left_padding_changes_nothing(elastic: ElasticVLM, processor: Processor) -> None:
    batch = _inputs(processor, 16)
    together = elastic.generate(**batch, num_visual_tokens=16, max_new_tokens=6, do_sample=False)[
        :, batch["input_ids"].shape[1] :
    ]
    for row, prompt in enumerate(PROMPTS):
        one = processor(images=[random_images(1, seed=row)], text=[prompt], num_visual_tokens=16, return_tensors="pt")
        alone = elastic.generate(**one, num_visual_tokens=16, max_new_tokens=6, do_sample=False)[
            :, one["input_ids"].shape[1] :
        ]
        length = min(alone.shape[1], together.shape[1])
        assert torch.equal(together[row, :length], alone[0, :length])


def test_the_cache_changes_nothing(elastic: ElasticVLM, processor: Processor) -> None:
    inputs = _inputs(processor, 40)
    runs = [
        elastic.generate(**inputs, num_visual_tokens=40, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*runs)


def test_sampling_is_seeded_and_several_answers_per_prompt_work(elastic: ElasticVLM, processor: Processor) -> None:
    inputs = _inputs(processor, 16)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(
            elastic.generate(**inputs, num_visual_tokens=16, max_new_tokens=4, do_sample=True, num_return_sequences=3)
        )
    assert runs[0].shape[0] == 6
    assert torch.equal(*runs)


def test_one_encoding_serves_every_budget(elastic: ElasticVLM, processor: Processor) -> None:
    patches = elastic.model.encode_patches(_inputs(processor, 16)["pixel_values"])
    for budget in (16, 64):
        inputs = _inputs(processor, budget)
        expected = elastic(**inputs, num_visual_tokens=budget).logits
        del inputs["pixel_values"]
        assert torch.equal(
            elastic(**inputs, **elastic.image_inputs(elastic.model.compress(patches, num_visual_tokens=budget))).logits,
            expected,
        )


def test_the_prefix_is_bidirectional_and_the_suffix_causal(elastic: ElasticVLM, processor: Processor) -> None:
    batch = processor(
        images=[random_images(1)],
        text=["how many"],
        suffix=["red blue green"],
        num_visual_tokens=16,
        return_tensors="pt",
    )
    batch.pop("labels")
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][0, -1] = changed["input_ids"][0, -2]
    first, second = (elastic(**inputs, num_visual_tokens=16).logits for inputs in (batch, changed))
    assert torch.equal(first[:, :-1], second[:, :-1])
    changed = {key: value.clone() for key, value in batch.items()}
    last_of_prefix = int((batch["token_type_ids"][0] == 0).sum()) - 2
    changed["input_ids"][0, last_of_prefix] = changed["input_ids"][0, -2]
    assert not torch.allclose(first[:, 20], elastic(**changed, num_visual_tokens=16).logits[:, 20])


def test_the_error_for_an_illegal_budget_names_the_legal_ones(elastic: ElasticVLM, processor: Processor) -> None:
    with pytest.raises(
        UnsupportedBudgetError, match=r"parcel does not support 8 visual tokens per image; legal budgets are 16 to 256"
    ):
        elastic.generate(**_inputs(processor, 8), num_visual_tokens=8)


def test_a_prompt_with_the_wrong_number_of_placeholders_is_refused(elastic: ElasticVLM, processor: Processor) -> None:
    with pytest.raises(UserError, match="have 32 image placeholders, but 2 images at 64 visual tokens each need 128"):
        elastic(**_inputs(processor, 16), num_visual_tokens=64)


def test_a_checkpoint_with_missing_weights_is_refused(
    tmp_path: Path, elastic: ElasticVLM, processor: Processor
) -> None:
    save_checkpoint(elastic, processor, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("multi_modal_projector.linear.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of the model, .*multi_modal_projector.linear.weight"):
        load_vlm(tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_trains_adapters_through_the_budget(tmp_path: Path, elastic: ElasticVLM, processor: Processor) -> None:
    peft = pytest.importorskip("peft")
    save_checkpoint(elastic, processor, tmp_path)
    adapted = peft.get_peft_model(load_vlm(tmp_path), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    batch = processor(
        images=[random_images(1)], text=["how many"], suffix=["red"], num_visual_tokens=16, return_tensors="pt"
    )
    adapted(**batch, num_visual_tokens=16).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)
    prompt = processor(images=[random_images(1)], text=["how many"], num_visual_tokens=16, return_tensors="pt")
    assert adapted.generate(**prompt, num_visual_tokens=16, max_new_tokens=2).shape[0] == 1


def test_the_tokenizer_encodes_any_text_and_keeps_location_tokens_whole() -> None:
    tokenizer = build_processor(MiniModelConfig(), CORPUS).tokenizer
    for text in ("red circle 47", "Ceci n'est pas une pipe: \u00e9\u4e2d", "<loc0001><loc1023><loc0512><loc0007> red"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip() == text
    assert tokenizer.tokenize("<loc0001><loc1023>") == ["<loc0001>", "<loc1023>"]
    assert len(tokenizer.tokenize("red")) == len(tokenizer.tokenize("blue red")) - len(tokenizer.tokenize("blue")) == 1
