"""FLOPs of a prefill with a reducer, compared with manual counts for LLaVA-1.5-7B (576 tokens, widths 1024, 4096)."""

import pytest

from parcelray.config import reducer as configs
from parcelray.config.reducer import ReducerConfig
from parcelray.profiling.backbone_shapes import PRESETS
from parcelray.profiling.flops import cost
from parcelray.profiling.reduction_flops import reduced_prefill_flops

SHAPE = PRESETS["llava-1.5-7b"]
TEXT, BUDGET = 30, 64
PROJECTION = 2 * (1024 * 4096 + 4096 * 4096)
"""Projector FLOPs of one token."""
SIMILARITY = 2 * 576**2
"""FLOPs of the similarities between all tokens, per dimension."""
LAYER = 4 * (576 + TEXT) * 4096 * 128 * (32 + 32) + 4 * (576 + TEXT) ** 2 * 4096 + 6 * (576 + TEXT) * 4096 * 11008
"""FLOPs of one decoder layer with all visual tokens."""

ADDITIONAL: list[tuple[ReducerConfig | None, int]] = [
    (None, 0),
    (configs.RandomSamplingConfig(), 0),
    (configs.SpatialSamplingConfig(), 0),
    (configs.SaliencyConfig(), 0),
    (configs.VisionZipConfig(), 0),
    (configs.PruMergeConfig(), 0),
    (configs.ScopeConfig(), SIMILARITY * 1024),
    (configs.VisPrunerConfig(), SIMILARITY * 1024),
    (configs.PruneSIDConfig(), 2 * SIMILARITY * 1024 + 9 * 576**3),
    (configs.AveragePoolingConfig(), 512 * PROJECTION),
    (configs.SaliencyConfig(merge_rest=True), 512 * PROJECTION),
    (configs.SaliencyConfig(definition="norm"), 512 * PROJECTION),
    (configs.SaliencyConfig(definition="last_text", layer=2), 512 * PROJECTION + 3 * LAYER),
    (configs.ClusterAggregateConfig(), 512 * PROJECTION + SIMILARITY * 4096),
    (configs.DivPruneConfig(), 512 * PROJECTION + SIMILARITY * 4096),
    (configs.MMTokConfig(), 512 * PROJECTION + SIMILARITY * 4096 + 2 * 576 * TEXT * 4096),
]


@pytest.mark.parametrize(("reducer", "additional"), ADDITIONAL, ids=repr)
def test_the_additional_cost_of_a_reducer_is_exact(reducer: ReducerConfig | None, additional: int) -> None:
    plain = cost(SHAPE, None, BUDGET, num_text_tokens=TEXT).total
    assert reduced_prefill_flops(SHAPE, reducer, BUDGET, TEXT) - plain == additional


def test_fastv_processes_all_tokens_in_two_layers() -> None:
    # The budget of 70 is rounded down to (2 x 576 + 30 x 36) / 32 = 69.75 tokens.
    full = cost(SHAPE, None, 576, num_text_tokens=TEXT)
    short = cost(SHAPE, None, 36, num_text_tokens=TEXT)
    flops = reduced_prefill_flops(SHAPE, configs.FastVConfig(), 70, TEXT)
    assert flops == full.total - full.decoder + 2 * LAYER + 30 * (short.decoder // 32)


def test_the_cost_of_merging_in_the_tower_is_counted_per_layer() -> None:
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
