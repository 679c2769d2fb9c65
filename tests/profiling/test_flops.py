"""The cost model: the paper's table, exact terms, and comparisons with torch's FLOP counter."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from parcelray.config.connector import ConnectorConfig, ParcelConnectorConfig, RouteConfig
from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.backbones import ElasticPaliGemmaConfig, ElasticPaliGemmaForConditionalGeneration
from parcelray.models.connectors import Connector, build_connector
from parcelray.profiling.backbone_shapes import PRESETS, BackboneShape, from_transformers_config
from parcelray.profiling.flops import (
    BYTES_PER_MB,
    CostBreakdown,
    cost,
    decoding_flops,
    kv_cache_bytes,
    patch_embedding_flops,
)

PALIGEMMA = PRESETS["paligemma2-3b"]
ALL_CONNECTORS = (
    "identity",
    "parcel",
    "mqt",
    "m3",
    "anchors_only",
    "fixed_anchors",
    "vit_cross_attention",
    "dual_cross_attention",
    "mqt_self_attention",
    "m3_self_attention",
)
SMALL = {
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 4,
        "image_size": 64,
    },
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "vocab_size": 512,
    },
}
REAL_3B = {
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    },
    "text_config": {"vocab_size": 257152},
}


def _connector(name: str, **settings: Any) -> ConnectorConfig:
    adapter: TypeAdapter[ConnectorConfig] = TypeAdapter(ConnectorConfig)
    return adapter.validate_python({"type": name, **settings})


def _frozen_connector(config: ConnectorConfig, shape: BackboneShape) -> Connector:
    connector = build_connector(
        config, hidden_size=shape.vision_width, grid_size=shape.grid_size, mlp_width=shape.vision_mlp_width
    )
    # The counter follows modules through gradient functions, but under no_grad a learned query bank has none.
    return connector.requires_grad_(False)


def _counted(run: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("num_frames", "budget", "tflop", "kv_mb"),
    [
        (1, 16, "1.0", "15"),
        (1, 64, "1.2", "20"),
        (1, 256, "2.0", "39"),
        (16, 16, "4.9", "33"),
        (16, 64, "8.2", "111"),
        (16, 256, "24.3", "423"),
    ],
)
def test_the_table_of_the_paper_is_reproduced_to_its_printed_digits(
    num_frames: int, budget: int, tflop: str, kv_mb: str
) -> None:
    result = cost(PALIGEMMA, ParcelConnectorConfig(), budget, num_frames)
    assert f"{result.total / 1e12:.1f}" == tflop
    assert f"{result.kv_cache_bytes / BYTES_PER_MB:.0f}" == kv_mb


def test_every_term_at_256_tokens_is_exact() -> None:
    result = cost(PALIGEMMA, ParcelConnectorConfig(), 256)
    # 256 = 64 anchors + 192 queries; each line is a formula of Appendix C.
    assert result == CostBreakdown(
        vision_projections=27 * 8 * 256 * 1152**2,
        vision_attention=27 * 4 * 256**2 * 1152,
        vision_mlp=27 * 4 * 256 * 1152 * 4304,
        connector_self_attention=8 * 256 * 1152**2 + 4 * 256**2 * 1152,
        connector_cross_attention=4 * (192 + 256) * 1152**2 + 4 * 192 * 256 * 1152,
        connector_mlp=4 * 192 * 1152 * 4304,
        projection=2 * 256 * 1152 * 2304,
        decoder_projections=26 * 4 * 385 * 2304 * 256 * 12,
        decoder_attention=26 * 4 * 385**2 * 8 * 256,
        decoder_mlp=26 * 6 * 385 * 2304 * 9216,
        output_head=2 * 129 * 2304 * 257152,
        kv_cache_bytes=385 * 2 * 2 * 26 * 4 * 256,
    )
    assert sum(result.terms().values()) == result.total == 1_972_535_836_672


@pytest.mark.parametrize("budget", [16, 64])
def test_parcel_without_queries_costs_nothing_in_the_connector(budget: int) -> None:
    assert cost(PALIGEMMA, ParcelConnectorConfig(), budget).connector == 0
    assert cost(PALIGEMMA, ParcelConnectorConfig(), budget + 2).connector > 0


def test_frames_scale_everything_before_the_decoder() -> None:
    one, sixteen = (
        cost(PALIGEMMA, ParcelConnectorConfig(), 100, num_frames, num_text_tokens=65) for num_frames in (1, 16)
    )
    assert sixteen.vision_encoder == 16 * one.vision_encoder
    assert sixteen.connector == 16 * one.connector
    assert sixteen.projection == 16 * one.projection
    assert sixteen.output_head == one.output_head
    assert sixteen.kv_cache_bytes == kv_cache_bytes(PALIGEMMA, 16 * 100 + 65)


def test_the_routing_of_the_configuration_is_used() -> None:
    routed = ParcelConnectorConfig(routing=(RouteConfig(min_budget=64, max_budget=256, anchor_grid=4),))
    # 16 anchors leave 48 queries, while the paper's routing has none at this budget.
    assert cost(PALIGEMMA, routed, 64).connector_mlp == 4 * 48 * 1152 * 4304


def test_without_connector_any_budget_is_legal() -> None:
    result = cost(PALIGEMMA, None, 77)
    assert result.connector == 0
    assert result.kv_cache_bytes == kv_cache_bytes(PALIGEMMA, 77 + 129)


def test_the_blind_baseline_runs_only_the_decoder() -> None:
    result = cost(PALIGEMMA, None, 1, num_frames=0)
    assert result.total == result.decoder + result.output_head
    assert result.kv_cache_bytes == kv_cache_bytes(PALIGEMMA, 129)


@pytest.mark.parametrize(("name", "budget"), [("parcel", 8), ("m3", 100), ("mqt", 257), ("identity", 64)])
def test_unsupported_budgets_are_rejected(name: str, budget: int) -> None:
    shape = PALIGEMMA.at_resolution(448) if budget > 256 else PALIGEMMA
    with pytest.raises(UnsupportedBudgetError, match=f"{name} does not support {budget} visual tokens"):
        cost(shape, _connector(name), budget)


@pytest.mark.parametrize(
    ("budget", "num_frames", "num_text", "message"),
    [
        (300, 1, None, "outside 1 to 256"),
        (0, 1, None, "outside 1 to 256"),
        (16, -1, None, "-1 frames"),
        (16, 1, -5, "-5 text tokens"),
    ],
)
def test_illegal_numbers_are_rejected(budget: int, num_frames: int, num_text: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cost(PALIGEMMA, ParcelConnectorConfig(), budget, num_frames, num_text)


@pytest.mark.parametrize("name", ALL_CONNECTORS)
@pytest.mark.parametrize("resolution", [224, 448])
def test_every_connector_matches_the_count_of_torch_exactly(name: str, resolution: int) -> None:
    shape = PALIGEMMA.at_resolution(resolution)
    config = _connector(name)
    with torch.device("meta"):
        connector = _frozen_connector(config, shape)
        features = torch.empty(2, shape.num_patches, shape.vision_width)
    legal = connector.supported_budgets
    for budget in {legal[0], legal[len(legal) // 3], legal[-1]}:
        counted = _counted(functools.partial(connector, features, num_visual_tokens=budget))
        expected = cost(shape, config, budget, num_frames=2).connector
        assert counted == expected


def _meta_paligemma(dims: dict[str, dict[str, int]]) -> PaliGemmaForConditionalGeneration:
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False} | dims["vision_config"]
    text = {"model_type": "gemma2"} | dims["text_config"]
    width = text.get("hidden_size", 2304)
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=width, hidden_size=width, image_token_index=5
    )
    # Eager attention consists of plain matrix products, which the counter recognises on every device.
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return PaliGemmaForConditionalGeneration(config).eval()


def _run_parts(
    model: PaliGemmaForConditionalGeneration,
    shape: BackboneShape,
    config: ConnectorConfig,
    budget: int,
    head_tokens: int,
) -> int:
    # The parts run one after the other, because the forward pass checks the placeholders and meta tensors have no
    # values.
    with torch.device("meta"):
        connector = _frozen_connector(config, shape)
        pixels = torch.empty(1, 3, shape.image_size, shape.image_size)
        text = torch.empty(1, 129, shape.text_width)
        mask = torch.zeros(1, 1, budget + 129, budget + 129)

    def prefill() -> None:
        patches = model.model.vision_tower(pixels).last_hidden_state
        visual = model.model.multi_modal_projector(connector(patches, num_visual_tokens=budget))
        masks = {"full_attention": mask, "sliding_attention": mask}
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([visual, text], dim=1), attention_mask=masks
        ).last_hidden_state
        model.lm_head(hidden[:, -head_tokens:])

    return _counted(prefill)


@pytest.mark.parametrize(
    ("dims", "name", "budget"),
    [
        (SMALL, "parcel", 16),
        (SMALL, "parcel", 256),
        (SMALL, "mqt", 64),
        (SMALL, "m3", 64),
        (REAL_3B, "parcel", 256),
        (REAL_3B, "identity", 256),
    ],
)
def test_the_prefill_matches_torch_except_for_patch_embedding_and_head_over_image_tokens(
    dims: dict[str, dict[str, int]], name: str, budget: int
) -> None:
    model = _meta_paligemma(dims)
    shape = from_transformers_config(model.config)
    config = _connector(name)
    result = cost(shape, config, budget)

    as_in_the_paper = result.total + patch_embedding_flops(shape)
    assert _run_parts(model, shape, config, budget, head_tokens=129) == as_in_the_paper

    # A plain forward pass also runs the head over the image tokens, which the paper does not count.
    head_over_image_tokens = 2 * budget * shape.text_width * shape.vocab_size
    assert (
        _run_parts(model, shape, config, budget, head_tokens=budget + 129) == as_in_the_paper + head_over_image_tokens
    )


def test_decoding_matches_the_count_of_torch_step_by_step() -> None:
    model = _meta_paligemma(SMALL)
    shape = from_transformers_config(model.config)
    cache = DynamicCache(config=model.config.text_config)
    embeddings = torch.zeros(1, 21, shape.text_width, device="meta")
    with torch.no_grad():
        model.model.language_model(inputs_embeds=embeddings[:, :20], past_key_values=cache, use_cache=True)

    def step() -> None:
        model.lm_head(
            model.model.language_model(
                inputs_embeds=embeddings[:, :1], past_key_values=cache, use_cache=True
            ).last_hidden_state
        )

    counted = [_counted(step) for _ in range(3)]
    assert [decoding_flops(shape, 20, 1 + steps) - decoding_flops(shape, 20, steps) for steps in (1, 2, 3)] == counted
    assert decoding_flops(shape, 20, 1) == decoding_flops(shape, 20, 0) == 0


def test_the_elastic_model_matches_the_count_of_torch() -> None:
    config = ElasticPaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False} | SMALL["vision_config"],
        text_config={"model_type": "gemma2"} | SMALL["text_config"],
        projection_dim=64,
        hidden_size=64,
        image_token_index=5,
        connector={"type": "parcel"},
    )
    config._attn_implementation = "eager"
    model = ElasticPaliGemmaForConditionalGeneration(config).eval().requires_grad_(False)
    shape = from_transformers_config(config)
    ids = torch.tensor([[5] * 100 + [7] * 129])
    pixels = torch.zeros(1, 3, 64, 64)

    def prefill() -> object:
        # The counter does not support the fused CPU kernel.
        with sdpa_kernel(SDPBackend.MATH):
            ones = torch.ones_like(ids)
            return model(
                input_ids=ids,
                pixel_values=pixels,
                attention_mask=ones,
                token_type_ids=0 * ones,
                num_visual_tokens=100,
                logits_to_keep=129,
            )

    expected = cost(shape, config.connector_config, 100).total + patch_embedding_flops(shape)
    assert _counted(prefill) == pytest.approx(expected, rel=0.01)
