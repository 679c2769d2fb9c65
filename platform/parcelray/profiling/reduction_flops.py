"""FLOPs of a prefill with a training-free reducer, by the paper's cost model (arXiv 2605.30126, Appendix C).

The number of tokens differs between the layers. A reducer that uses or averages projected tokens needs all tokens to
pass the projector. If it selects or merges before the projector, or by position alone, only the budget passes it.

These operations of reducers are counted in addition:
- the similarity product 2 N^2 D, if all tokens are compared with each other;
- the principal components of PruneSID: 2 N^2 D for the matrix, and 9 N^3 for its eigenvectors (Golub and Van Loan's
  symmetric QR);
- for ToMe, the vision tower with merging instead of the plain one.
Sorting, seeding and averaging are not counted, just as normalisation and softmax.
"""

from dataclasses import replace

from parcelray.config.reducer import (
    ClusterAggregateConfig,
    DivPruneConfig,
    FastVConfig,
    MMTokConfig,
    PruMergeConfig,
    PruneSIDConfig,
    PyramidDropConfig,
    RandomSamplingConfig,
    ReducerConfig,
    RestoreConfig,
    SaliencyConfig,
    ScopeConfig,
    SparseVLMConfig,
    SpatialSamplingConfig,
    ToMeConfig,
    VisionZipConfig,
    VisPrunerConfig,
)
from parcelray.models.token_reduction import build_reducer
from parcelray.models.token_reduction.in_decoder import InDecoderReducer
from parcelray.models.token_reduction.tome import merge_counts
from parcelray.profiling.backbone_shapes import BackboneShape
from parcelray.profiling.flops import cost

_PROJECTED = (ClusterAggregateConfig, DivPruneConfig, RestoreConfig, MMTokConfig)
"""Reducers that compare projected tokens with each other."""
_ENCODED = (ScopeConfig, VisPrunerConfig, PruneSIDConfig)
"""Reducers that compare patch features with each other."""
_BEFORE_THE_PROJECTOR = (
    RandomSamplingConfig,
    SpatialSamplingConfig,
    VisionZipConfig,
    PruMergeConfig,
    ScopeConfig,
    VisPrunerConfig,
    PruneSIDConfig,
)
"""Reducers that select or merge tokens without using projected tokens."""


def reduced_prefill_flops(
    shape: BackboneShape, reducer: ReducerConfig | None, budget: int, num_text_tokens: int
) -> int:
    """Computes the FLOPs of one prefill with one image.

    Args:
        shape: dimensions of the backbone.
        reducer: configuration of the reducer; None: the first `budget` tokens, at no cost.
        budget: number of visual tokens; for a reducer inside the decoder, the mean over its layers.
        num_text_tokens: number of text tokens of the prompt.
    """
    full = cost(shape, None, shape.num_patches, num_text_tokens=num_text_tokens)
    if budget == shape.num_patches or reducer is None:
        return cost(shape, None, budget, num_text_tokens=num_text_tokens).total
    if isinstance(reducer, FastVConfig | PyramidDropConfig | SparseVLMConfig):
        built = build_reducer(reducer)
        assert isinstance(built, InDecoderReducer)
        stages = built.stages(shape.text_layers, shape.num_patches, budget)
        edges = [0, *(stage.layer for stage in stages), shape.text_layers]
        counts = [shape.num_patches, *(stage.num_tokens for stage in stages)]
        decoder = sum(
            (end - start) * _layer(shape, count, num_text_tokens)
            for start, end, count in zip(edges, edges[1:], counts, strict=False)
        )
        return full.total - full.decoder + decoder
    short = cost(shape, None, budget, num_text_tokens=num_text_tokens)
    total = short.total
    if not _is_before_the_projector(reducer):
        total += full.projection - short.projection
    patches = shape.num_patches
    if isinstance(reducer, ToMeConfig):
        return short.total - short.vision_encoder + _merging_tower(shape, budget)
    if isinstance(reducer, SaliencyConfig) and reducer.definition.endswith("text"):
        # The decoder layers up to the one that gives the saliency process all tokens once more.
        total += (reducer.layer + 1) * _layer(shape, patches, num_text_tokens)
    if isinstance(reducer, _PROJECTED):
        total += 2 * patches**2 * shape.text_width
    if isinstance(reducer, MMTokConfig):
        total += 2 * patches * num_text_tokens * shape.text_width
    if isinstance(reducer, _ENCODED):
        total += 2 * patches**2 * shape.vision_width
    if isinstance(reducer, PruneSIDConfig):
        total += 2 * patches**2 * shape.vision_width + 9 * patches**3
    return total


def _is_before_the_projector(reducer: ReducerConfig) -> bool:
    if isinstance(reducer, SaliencyConfig):
        # With `merge_rest`, the other tokens are merged after the projector.
        return reducer.definition == "class_attention" and not reducer.merge_rest
    return isinstance(reducer, _BEFORE_THE_PROJECTOR)


def _layer(shape: BackboneShape, num_visual_tokens: int, num_text_tokens: int) -> int:
    return cost(replace(shape, text_layers=1), None, num_visual_tokens, num_text_tokens=num_text_tokens).decoder


def _merging_tower(shape: BackboneShape, budget: int) -> int:
    """Computes the FLOPs of a vision tower that merges tokens in each layer, between attention and MLP."""
    counts = merge_counts(shape.num_patches, budget, shape.vision_layers)
    assert counts is not None, "the budget is legal"
    total, tokens, width = 0, shape.num_patches + shape.class_tokens, shape.vision_width
    for count in counts:
        total += 8 * tokens * width**2 + 4 * tokens**2 * width
        tokens -= count
        total += 4 * tokens * width * shape.vision_mlp_width
    return total
