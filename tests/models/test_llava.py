"""The elastic LLaVA compared with the stock transformers class, for each kind of vision tower."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from parcelray.config.connector import ConnectorConfig, M3ConnectorConfig, MqtConnectorConfig, ParcelConnectorConfig
from parcelray.config.model import MiniLlavaModelConfig
from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.backbones import ElasticLlavaConfig, ElasticLlavaForConditionalGeneration
from parcelray.models.backbones.llava_processor import ElasticLlavaProcessor
from parcelray.models.connectors.pooling import pool_grid
from parcelray.models.mini import save_checkpoint
from parcelray.models.mini_llava import build, build_config, build_processor
from parcelray.models.token_reduction.base import ReductionContext
from parcelray.models.token_reduction.encoder_view import EncoderView
from parcelray.models.token_reduction.tome import ToMe
from parcelray.models.training_attention import training_kernels
from parcelray.models.vlm import connector_of, image_size_of, load_processor, load_vlm
from parcelray.profiling.backbone_shapes import from_transformers_config

from .conftest import CORPUS, MINI_LLAVA, random_images, write_tower_as_on_the_hub

PROMPTS = ["what color is the circle", "how many"]


@pytest.fixture(scope="module")
def llava_processor() -> ElasticLlavaProcessor:
    return build_processor(MINI_LLAVA, CORPUS)


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory: pytest.TempPathFactory, llava_processor: ElasticLlavaProcessor) -> Path:
    """A stock LLaVA-1.5 checkpoint with random weights, in the layout of the hub.

    The features come from the second-to-last layer, and the keys have the names of the original release.
    """
    folder = tmp_path_factory.mktemp("stock_llava")
    values = build_config(MINI_LLAVA, llava_processor).to_dict() | {"vision_feature_layer": -2}
    config = LlavaConfig(
        **{key: value for key, value in values.items() if key not in ("model_type", "architectures", "connector")}
    )
    torch.manual_seed(3)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    write_tower_as_on_the_hub(folder)
    llava_processor.save_pretrained(folder)
    return folder


def _inputs(processor: ElasticLlavaProcessor, budget: int | None, images_per_prompt: int = 1) -> dict[str, Tensor]:
    images = [random_images(images_per_prompt, seed=index) for index in range(len(PROMPTS))]
    return dict(processor(images=images, text=PROMPTS, num_visual_tokens=budget, return_tensors="pt", padding=True))


def test_the_stock_folder_has_the_hubs_key_names(stock_folder: Path) -> None:
    with safe_open(stock_folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert {"language_model.model.layers.0.self_attn.q_proj.weight", "multi_modal_projector.linear_1.weight"} <= keys
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in keys


def test_the_processor_writes_the_prompts_of_the_stock_processor(
    llava_processor: ElasticLlavaProcessor, stock_folder: Path
) -> None:
    stock = LlavaProcessor.from_pretrained(stock_folder)
    lines = [f"USER: <image>\n{prompt} ASSISTANT:" for prompt in PROMPTS]
    images = [random_images(1, seed=index)[0] for index in range(2)]
    expected = stock(images=images, text=lines, return_tensors="pt", padding=True)
    result = _inputs(llava_processor, None)
    for key in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(result[key], expected[key])
    assert torch.equal(llava_processor.prompts(PROMPTS, 1, num_visual_tokens=256)["input_ids"], expected["input_ids"])
    blind = llava_processor.prompts(PROMPTS, 1, num_visual_tokens=0)
    assert torch.equal(
        blind["input_ids"],
        stock(text=[f"USER: {prompt} ASSISTANT:" for prompt in PROMPTS], return_tensors="pt", padding=True)[
            "input_ids"
        ],
    )
    loaded = load_processor(stock_folder)
    assert isinstance(loaded, ElasticLlavaProcessor)
    assert (loaded.num_patches, image_size_of(stock_folder)) == (256, 64)


@pytest.mark.parametrize("num_visual_tokens", [None, 256])
def test_identity_at_the_full_budget_is_the_stock_model_exactly(
    stock_folder: Path, llava_processor: ElasticLlavaProcessor, num_visual_tokens: int | None
) -> None:
    stock = LlavaForConditionalGeneration.from_pretrained(stock_folder).eval()
    elastic = load_vlm(stock_folder).eval()
    inputs = _inputs(llava_processor, 256)
    with torch.no_grad():
        assert torch.equal(elastic(**inputs, num_visual_tokens=num_visual_tokens).logits, stock(**inputs).logits)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        elastic.generate(**inputs, num_visual_tokens=num_visual_tokens, **greedy), stock.generate(**inputs, **greedy)
    )


@pytest.mark.parametrize(
    "connector", [ParcelConnectorConfig(num_heads=4), MqtConnectorConfig(num_heads=4), M3ConnectorConfig()]
)
def test_a_connector_survives_save_and_load(
    tmp_path: Path, stock_folder: Path, llava_processor: ElasticLlavaProcessor, connector: ConnectorConfig
) -> None:
    model = load_vlm(stock_folder, connector=connector, seed=1).eval()
    inputs = _inputs(llava_processor, 64, 2)
    with torch.no_grad():
        expected = model(**inputs, num_visual_tokens=64).logits
        full = model.model.encode_patches(inputs["pixel_values"])
        tokens = model.connector(full, num_visual_tokens=64)
    assert expected.shape[1] == inputs["input_ids"].shape[1]
    assert 0.3 < float(tokens.std() / full.std()) < 3
    save_checkpoint(model, llava_processor, tmp_path)
    loaded = load_vlm(tmp_path).eval()
    assert loaded.connector.name == connector.type == connector_of(tmp_path).name
    with torch.no_grad():
        assert torch.equal(loaded(**inputs, num_visual_tokens=64).logits, expected)
    with pytest.raises(UnsupportedBudgetError):
        loaded(**_inputs(llava_processor, 300), num_visual_tokens=300)


@pytest.mark.parametrize("scale", [1, 4, 16, 64, 256])
def test_m3_pools_the_projected_tokens_as_in_its_release(stock_folder: Path, scale: int) -> None:
    model = load_vlm(stock_folder, connector=M3ConnectorConfig()).eval()
    patches = torch.randn(2, 256, MINI_LLAVA.vision_width)
    with torch.no_grad():
        grid = model.model.multi_modal_projector(patches).unflatten(1, (16, 16)).permute(0, 3, 1, 2)
        kernel = int((256 / scale) ** 0.5)
        expected = F.avg_pool2d(grid, kernel, kernel).permute(0, 2, 3, 1).flatten(1, 2)
        assert torch.allclose(model.model.compress(patches, num_visual_tokens=scale), expected, atol=1e-6)
        if scale < 256:
            pooled = F.avg_pool2d(patches.unflatten(1, (16, 16)).permute(0, 3, 1, 2), kernel, kernel)
            before = model.model.multi_modal_projector(pooled.permute(0, 2, 3, 1).flatten(1, 2))
            assert float((before - expected).norm() / expected.norm()) > 0.1


@pytest.mark.parametrize("section", [{"type": "m3"}, {"type": "m3", "variant": "parcel_baseline"}])
def test_m3_checkpoints_from_before_its_variants_pool_before_the_projector(
    tmp_path: Path, llava_processor: ElasticLlavaProcessor, section: dict[str, str]
) -> None:
    config = build_config(MINI_LLAVA, llava_processor)
    config.connector = section
    save_checkpoint(ElasticLlavaForConditionalGeneration(config), llava_processor, tmp_path)
    model = load_vlm(tmp_path).eval()
    assert model.supported_budgets == (4, 16, 64, 256)
    assert model.config.connector_config == M3ConnectorConfig(variant="parcel_baseline", positions="contiguous")
    patches = torch.randn(1, 256, MINI_LLAVA.vision_width)
    with torch.no_grad():
        expected = model.model.multi_modal_projector(pool_grid(patches, grid_size=16, side=4))
        assert torch.equal(model.model.compress(patches, num_visual_tokens=16), expected)


def test_merging_runs_only_the_layers_up_to_the_patch_features(
    stock_folder: Path, llava_processor: ElasticLlavaProcessor
) -> None:
    # The features come from the last layer but one. The plain tower runs the last layer nevertheless, ToMe does not.
    model = load_vlm(stock_folder).eval()
    shape = from_transformers_config(model.config)
    runs: list[int] = []
    for index, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.layer_norm1.register_forward_hook(lambda *_, index=index: runs.append(index))
    with torch.no_grad():
        view = EncoderView(model.model, _inputs(llava_processor, 256)["pixel_values"], watch=False)
        assert runs == list(range(shape.vision_layers)) == [0, 1, 2]
        runs.clear()
        ToMe()(view.project(view.patch_features_IND), num_visual_tokens=64, context=ReductionContext(encoder=view))
    assert runs == list(range(shape.vision_layers - shape.unused_vision_layers)) == [0, 1]


def test_prompts_for_another_budget_are_refused(stock_folder: Path, llava_processor: ElasticLlavaProcessor) -> None:
    model = load_vlm(stock_folder, connector=M3ConnectorConfig()).eval()
    with pytest.raises(UserError, match="32 image placeholders, but 2 images at 64 visual tokens each need 128"):
        model(**_inputs(llava_processor, 16), num_visual_tokens=64)


@pytest.mark.parametrize(("tower", "has_class_token"), [("clip", True), ("siglip", False), ("convnext", False)])
def test_every_tower_gives_the_whole_grid_and_can_be_trained(tower: str, has_class_token: bool, tmp_path: Path) -> None:
    config = MiniLlavaModelConfig(**MINI_LLAVA.model_dump() | {"tower": tower})
    model, processor = build(config, CORPUS, None, seed=0)
    inputs = _inputs(processor, 256)
    patches = model.model.encode_patches(inputs["pixel_values"])
    assert patches.shape == (2, 256, MINI_LLAVA.vision_width)
    assert model.model.has_class_token is has_class_token
    # Patches are in grid order: a change in the first row of the image changes the first patches most.
    moved = inputs["pixel_values"].clone()
    moved[:, :, :4] += 1
    change = (model.model.encode_patches(moved) - patches).detach().norm(dim=2)
    assert float(change[:, :16].mean()) > 1.5 * float(change[:, 128:].mean())
    model(**inputs, labels=inputs["input_ids"], num_visual_tokens=256).loss.backward()
    assert all(
        parameter.grad is not None
        for name, parameter in model.named_parameters()
        if "post_layernorm" not in name and "tower.layernorm" not in name
    )
    save_checkpoint(model.eval(), processor, tmp_path)
    loaded = load_vlm(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_features_of_several_layers_are_refused(llava_processor: ElasticLlavaProcessor) -> None:
    values = build_config(MINI_LLAVA, llava_processor).to_dict() | {"vision_feature_layer": [-2, -1]}
    with pytest.raises(UserError, match="joins several layers"):
        ElasticLlavaForConditionalGeneration(ElasticLlavaConfig(**values))


def test_an_unsupported_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(UserError, match="a model of type qwen2_vl; supported types are paligemma, llava"):
        load_vlm(tmp_path)


@pytest.mark.parametrize(("dtype", "cosine"), [(None, 0.9999), (torch.bfloat16, 0.99)])
def test_gradients_with_training_kernels_agree_with_those_of_stock_kernels(
    llava_processor: ElasticLlavaProcessor, dtype: torch.dtype | None, cosine: float
) -> None:
    """Cosine of each parameter's gradients, in fp32 and under bf16 autocast, against stock kernels in fp32."""
    model, _ = build(MINI_LLAVA, CORPUS, ParcelConnectorConfig(num_heads=4).model_dump(), seed=0)
    inputs = _inputs(llava_processor, 80)
    targets_BS = torch.randint(0, 90, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    # Nothing reads the rows of the padding, which the kernels fill differently.
    targets_BS[inputs["attention_mask"] == 0] = -100

    def gradients(kernels: AbstractContextManager[None], autocast: torch.dtype | None) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None), kernels:
            logits_BSV = model(**inputs, num_visual_tokens=80).logits.float()
        F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten()).backward()
        found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    expected, actual = gradients(nullcontext(), None), gradients(training_kernels(model), dtype)
    assert actual.keys() == expected.keys()
    largest = max(float(each.norm()) for each in expected.values())
    for name, each in expected.items():
        # The bias of keys has no gradient but rounding errors.
        if float(each.norm()) > 1e-3 * largest:
            assert float(F.cosine_similarity(actual[name].flatten(), each.flatten(), dim=0)) >= cosine, name
