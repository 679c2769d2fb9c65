"""FLOPs of a prefill with a reduction, counted by hand at the shape of LLaVA-1.5-7B: 576 tokens of width 1024, projected to 4096."""

import pytest

from parcelray.config import reducer as configs
from parcelray.config.reducer import ReducerConfig
from parcelray.profiling.backbone_shapes import PRESETS
from parcelray.profiling.flops import cost
from parcelray.profiling.reduction_flops import reduced_prefill_flops

SHAPE = PRESETS["llava-1.5-7b"]
TEXT, BUDGET = 30, 64
PROJECTION = 2 * (1024 * 4096 + 4096 * 4096)
"""Of one token."""
ALIKE = 2 * 576**2
"""Cosines of all tokens with each other, by dimension."""
LAYER = 4 * (576 + TEXT) * 4096 * 128 * (32 + 32) + 4 * (576 + TEXT) ** 2 * 4096 + 6 * (576 + TEXT) * 4096 * 11008
"""Of the decoder, with all visual tokens."""

BESIDES: list[tuple[ReducerConfig | None, int]] = [
    (None, 0),
    (configs.RandomSamplingConfig(), 0),
    (configs.SpatialSamplingConfig(), 0),
    (configs.SaliencyConfig(), 0),
    (configs.VisionZipConfig(), 0),
    (configs.PruMergeConfig(), 0),
    (configs.ScopeConfig(), ALIKE * 1024),
    (configs.VisPrunerConfig(), ALIKE * 1024),
    (configs.PruneSIDConfig(), 2 * ALIKE * 1024 + 9 * 576**3),
    (configs.AveragePoolingConfig(), 512 * PROJECTION),
    (configs.SaliencyConfig(merge_rest=True), 512 * PROJECTION),
    (configs.SaliencyConfig(definition="norm"), 512 * PROJECTION),
    (configs.SaliencyConfig(definition="last_text", layer=2), 512 * PROJECTION + 3 * LAYER),
    (configs.ClusterAggregateConfig(), 512 * PROJECTION + ALIKE * 4096),
    (configs.DivPruneConfig(), 512 * PROJECTION + ALIKE * 4096),
    (configs.MMTokConfig(), 512 * PROJECTION + ALIKE * 4096 + 2 * 576 * TEXT * 4096),
]


@pytest.mark.parametrize(("reducer", "besides"), BESIDES, ids=repr)
def test_a_reduction_costs_what_it_looks_at(reducer: ReducerConfig | None, besides: int) -> None:
    plain = cost(SHAPE, None, BUDGET, num_text_tokens=TEXT).total
    assert reduced_prefill_flops(SHAPE, reducer, BUDGET, TEXT) - plain == besides


def test_fastv_has_two_layers_with_all_tokens() -> None:
    # (2 x 576 + 30 x 36) / 32 = 69.75 of a budget of 70, rounded down.
    full = cost(SHAPE, None, 576, num_text_tokens=TEXT)
    short = cost(SHAPE, None, 36, num_text_tokens=TEXT)
    found = reduced_prefill_flops(SHAPE, configs.FastVConfig(), 70, TEXT)
    assert found == full.total - full.decoder + 2 * LAYER + 30 * (short.decoder // 32)


def test_merging_in_the_tower_pays_for_its_tokens_layer_by_layer() -> None:
    shape = SHAPE
    tokens, width, tower = 576, 1024, 0
    for layer in range(shape.vision_layers):
        left = shape.vision_layers - layer
        count = -(-(tokens - BUDGET) // left)
        tower += 8 * (tokens + 1) * width**2 + 4 * (tokens + 1) ** 2 * width + 4 * (tokens - count + 1) * width * 4096
        tokens -= count
    plain = cost(shape, None, BUDGET, num_text_tokens=TEXT)
    assert (
        reduced_prefill_flops(shape, configs.ToMeConfig(), BUDGET, TEXT) == plain.total - plain.vision_encoder + tower
    )
