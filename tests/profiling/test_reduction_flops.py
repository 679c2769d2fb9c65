"""FLOPs of a prefill with a reducer, compared with manual counts for LLaVA-1.5-7B (576 tokens, widths 1024, 4096)."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parcelray.config import reducer as configs
from parcelray.config.reducer import ReducerConfig
from parcelray.errors import UserError
from parcelray.models.token_reduction.divprune import DivPrune
from parcelray.models.token_reduction.restore import Restore
from parcelray.profiling.backbone_shapes import PRESETS, from_mapping
from parcelray.profiling.flops import cost
from parcelray.profiling.reduction_flops import reduced_cost, reduced_prefill_flops

SHAPE = PRESETS["llava-1.5-7b"]
TEXT, BUDGET = 30, 64
PROJECTION = 2 * (1024 * 4096 + 4096 * 4096)
"""Projector FLOPs of one token."""
SIMILARITY = 2 * 576**2
"""FLOPs of the similarities between all tokens, per dimension."""
LAYER = 4 * (576 + TEXT) * 4096 * 128 * (32 + 32) + 4 * (576 + TEXT) ** 2 * 4096 + 6 * (576 + TEXT) * 4096 * 11008
"""FLOPs of one decoder layer with all visual tokens."""

ATTENTION = 2 * (576 + TEXT) * 4096**2 + 2 * TEXT * 4096**2 + 2 * TEXT * (576 + TEXT) * 4096
"""FLOPs of keys, queries and attention of all text tokens in one decoder layer."""

ADDITIONAL: list[tuple[ReducerConfig | None, int]] = [
    (None, 0),
    (configs.RandomSamplingConfig(), 0),
    (configs.SpatialSamplingConfig(), 0),
    (configs.SaliencyConfig(), 0),
    # 10 targets, compared with all patches by the mean of the keys over 16 heads.
    (configs.VisionZipConfig(), 2 * 576 * 10 * 1024 // 16),
    (configs.PruMergeConfig(), 2 * 576 * 63 * 1024),
    (configs.PruMergeConfig(spatial=True), 2 * 576 * 63 * 1024),
    (configs.ScopeConfig(), SIMILARITY * 1024),
    # 544 patches are not important; each step removes 8, until 32 are left.
    (configs.VisPrunerConfig(), sum(2 * (rest // 2) ** 2 * 1024 for rest in range(40, 545, 8))),
    (configs.PruneSIDConfig(), 2 * SIMILARITY * 1024 + 9 * 576**3),
    (configs.AveragePoolingConfig(), 512 * PROJECTION),
    (configs.SaliencyConfig(merge_rest=True), 512 * PROJECTION + 2 * 576 * 64 * 4096),
    (configs.SaliencyConfig(definition="norm"), 512 * PROJECTION),
    # Two layers run on all tokens, and the attention of the third one ranks them.
    (configs.SaliencyConfig(definition="last_text", layer=2), 512 * PROJECTION + 2 * LAYER + ATTENTION),
    (configs.ClusterAggregateConfig(), 512 * PROJECTION + SIMILARITY * 4096),
    (configs.DivPruneConfig(), 512 * PROJECTION + SIMILARITY * 4096),
    (configs.RestoreConfig(), 512 * PROJECTION + (SIMILARITY + 2 * 544**2) * 4096),
    (configs.RestoreConfig(base="class_attention"), 512 * PROJECTION + 2 * 544**2 * 4096),
    (configs.MMTokConfig(), 512 * PROJECTION + SIMILARITY * 4096 + 2 * 576 * TEXT * 4096),
]


@pytest.mark.parametrize(("reducer", "additional"), ADDITIONAL, ids=repr)
def test_the_additional_cost_of_a_reducer_is_exact(reducer: ReducerConfig | None, additional: int) -> None:
    plain = cost(SHAPE, None, BUDGET, num_text_tokens=TEXT).total
    assert reduced_prefill_flops(SHAPE, reducer, BUDGET, TEXT) - plain == additional


def test_the_products_of_divprune_and_restore_match_the_count_of_torch() -> None:
    tokens = torch.randn(1, 576, 32)
    with FlopCounterMode(display=False) as counter:
        DivPrune()(tokens, num_visual_tokens=BUDGET)
        Restore()(tokens, num_visual_tokens=BUDGET)
    assert counter.get_total_flops() == 2 * SIMILARITY * 32 + 2 * 544**2 * 32


def test_fastv_processes_all_tokens_in_two_layers() -> None:
    # The budget of 70 is rounded down to (2 x 576 + 30 x 36) / 32 = 69.75 tokens.
    full = cost(SHAPE, None, 576, num_text_tokens=TEXT)
    short = cost(SHAPE, None, 36, num_text_tokens=TEXT)
    result = reduced_cost(SHAPE, configs.FastVConfig(), 70, num_text_tokens=TEXT)
    assert result.tokens_by_layer == (576,) * 2 + (36,) * 30
    assert result.reducer == 0
    assert result.total == full.total - full.decoder + 2 * LAYER + 30 * (short.decoder // 32)
    assert result.model.kv_cache_bytes == (2 * 576 + 30 * 36 + 32 * TEXT) * 2 * 2 * 4096


def test_pyramid_drop_needs_the_keys_of_the_dropped_tokens() -> None:
    # The published schedule; the last text token attends to all tokens before a stage.
    result = reduced_cost(SHAPE, configs.PyramidDropConfig(), 270, num_text_tokens=TEXT)
    assert result.tokens_by_layer == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8
    assert result.reducer == 2 * (576 - 72) * 4096**2 + 2 * (576 + 288 + 144) * 4096


def test_sparsevlm_rates_and_recycles_at_each_stage() -> None:
    # The published schedule of 192, with its clusters.
    result = reduced_cost(SHAPE, configs.SparseVLMConfig(), 193, num_text_tokens=TEXT)
    first, second, third = result.tokens_by_layer[2], result.tokens_by_layer[6], result.tokens_by_layer[15]
    assert result.tokens_by_layer == (576,) * 2 + (first,) * 4 + (second,) * 9 + (third,) * 17
    assert (first, second, third) == pytest.approx((309, 204, 113), abs=3)
    attention = 2 * (576 - third) * 4096**2 + 2 * TEXT * (576 + first + second) * 4096
    # int(0.3 x 276) + 1 = 83, 33 and 29 recycled tokens.
    recycled = 2 * (83**2 + 33**2 + 29**2) * 4096
    assert result.reducer == pytest.approx(2 * 576 * TEXT * 4096 + attention + recycled, rel=1e-3)


def test_a_video_is_reduced_frame_by_frame_before_the_decoder_and_as_a_whole_inside_it() -> None:
    one = reduced_cost(SHAPE, configs.ScopeConfig(), BUDGET, num_text_tokens=TEXT)
    video = reduced_cost(SHAPE, configs.ScopeConfig(), BUDGET, num_frames=4, num_text_tokens=TEXT)
    assert video.reducer == 4 * one.reducer
    assert video.tokens_by_layer == (4 * BUDGET,) * 32
    inside = reduced_cost(SHAPE, configs.FastVConfig(), BUDGET, num_frames=4, num_text_tokens=TEXT)
    assert inside.tokens_by_layer[:2] == (4 * 576,) * 2
    assert 4 * BUDGET - 1 < sum(inside.tokens_by_layer) / 32 <= 4 * BUDGET


def test_the_cost_of_merging_in_the_tower_is_counted_per_layer_that_runs() -> None:
    # The patch features leave the tower after 23 of its 24 layers, and merging runs no layer after them.
    tokens, width, tower, matching = 576, 1024, 0, 0
    for layer in range(23):
        left = 23 - layer
        count = -(-(tokens - BUDGET) // left)
        tower += 8 * (tokens + 1) * width**2 + 4 * (tokens + 1) ** 2 * width + 4 * (tokens - count + 1) * width * 4096
        # Each token of the first half is compared with the second half, by the mean key of 16 heads.
        matching += 2 * -(-tokens // 2) * (tokens // 2) * width // 16
        tokens -= count
    plain = cost(SHAPE, None, BUDGET, num_text_tokens=TEXT)
    result = reduced_cost(SHAPE, configs.ToMeConfig(), BUDGET, num_text_tokens=TEXT)
    assert result.model.vision_encoder == tower
    assert result.reducer == matching
    assert result.total == plain.total - plain.vision_encoder + tower + matching


@pytest.mark.parametrize(("layer", "unused"), [(-2, 1), (-1, 0), (None, 1), (20, 4)])
def test_the_layers_after_the_patch_features_are_read_from_the_configuration(layer: int | None, unused: int) -> None:
    config = {
        "model_type": "elastic_llava",
        "vision_config": {"model_type": "clip_vision_model"},
        "text_config": {"model_type": "llama"},
    } | ({} if layer is None else {"vision_feature_layer": layer})
    shape = from_mapping(config, "llava")
    assert (shape.vision_layers, shape.unused_vision_layers) == (24, unused)


def test_the_full_budget_costs_nothing_extra() -> None:
    assert reduced_cost(SHAPE, configs.ScopeConfig(), 576, num_text_tokens=TEXT).reducer == 0


def test_a_reducer_that_does_not_fit_the_backbone_is_refused() -> None:
    convolutional = replace(SHAPE, vision_heads=0)
    with pytest.raises(UserError, match="scope reads the attention of the vision tower, but the convolutional tower"):
        reduced_cost(convolutional, configs.ScopeConfig(), BUDGET)
    with pytest.raises(UserError, match=r"saliency\.layer 40 is not a layer of this decoder of 32 layers"):
        reduced_cost(SHAPE, configs.SaliencyConfig(definition="last_text", layer=40), BUDGET)
