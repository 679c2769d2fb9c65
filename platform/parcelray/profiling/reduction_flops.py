"""Cost of a prefill with a training-free reducer, by the paper's cost model (arXiv 2605.30126, Appendix C).

The number of tokens differs between the layers. A reducer that uses or averages projected tokens needs all tokens to
pass the projector. If it selects or merges before the projector, or by position alone, only the budget passes it.

A reducer's own cost is its matrix products. Attention and keys that the model computes anyway cost nothing. Sorting,
seeding, averaging and norms are not counted, just as normalisation and softmax in the model. Symbols as in `flops`;
N patches per image, K budget, V visual tokens of the prompt, R tokens of the rest, n and m tokens before and after a
stage:

- similarities: of all tokens 2 N^2 D (`cluster_aggregate`, `divprune`, `scope`, `mmtok`, `prunesid`), of the rest
  2 R^2 D (`restore`), of the two halves in every step or layer (`vispruner`, `tome`), of kept tokens with all
  (`prumerge`, `visionzip`, `saliency` with `merge_rest`);
- principal components (`prunesid`): 2 N^2 D for the matrix, and 9 N^3 for its eigenvectors (Golub and Van Loan's
  symmetric QR);
- words with visual tokens: 2 V N_t D_l (`mmtok`, `sparsevlm`);
- the decoder layers that `saliency` runs on all tokens before the reduction, and the attention of the next one;
- keys of the n - m tokens that a stage drops, and the attention to all n (`pyramid_drop`, `sparsevlm`), and the
  distances of the recycled tokens (`sparsevlm`).

ToMe replaces the tower's layers up to the patch features by merging ones. The layers after them do not run.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from parcelray.config.connector import ConnectorConfig
from parcelray.config.reducer import (
    ClusterAggregateConfig,
    DivPruneConfig,
    MMTokConfig,
    PruMergeConfig,
    PruneSIDConfig,
    RandomSamplingConfig,
    ReducerConfig,
    RestoreConfig,
    SaliencyConfig,
    ScopeConfig,
    SpatialSamplingConfig,
    ToMeConfig,
    VisionZipConfig,
    VisPrunerConfig,
)
from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.backbones.base import Depths
from parcelray.models.token_reduction import TokenReducer, build_reducer
from parcelray.models.token_reduction.in_decoder import InDecoderReducer, tokens_by_layer
from parcelray.models.token_reduction.pyramid_drop import PyramidDrop
from parcelray.models.token_reduction.restore import num_selected
from parcelray.models.token_reduction.saliency import check_layer
from parcelray.models.token_reduction.sparsevlm import SparseVLM, recycling_of
from parcelray.models.token_reduction.tome import merge_counts
from parcelray.models.token_reduction.visionzip import num_contextual
from parcelray.models.token_reduction.vispruner import halves_of
from parcelray.profiling.backbone_shapes import BackboneShape
from parcelray.profiling.flops import CostBreakdown, cost, default_text_tokens, kv_cache_bytes

_BEFORE_THE_PROJECTOR = (
    RandomSamplingConfig,
    SpatialSamplingConfig,
    VisionZipConfig,
    PruMergeConfig,
    ScopeConfig,
    VisPrunerConfig,
    PruneSIDConfig,
    ToMeConfig,
)
"""Reducers that select or merge tokens without using projected tokens."""


class ReducedCost(NamedTuple):
    """The cost of one prefill with a reducer."""

    model: CostBreakdown
    """FLOPs of the model by term, and the bytes of its KV cache, with the tokens that are left at each point."""
    reducer: int
    """FLOPs of the reducer itself."""
    tokens_by_layer: tuple[int, ...]
    """Visual tokens of the prompt in each layer of the decoder."""

    @property
    def total(self) -> int:
        """FLOPs of the whole prefill."""
        return self.model.total + self.reducer

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self.model.kv_cache_bytes

    def terms(self) -> dict[str, int]:
        """The FLOP terms by name, with the reducer's own cost last; they sum to `total`."""
        return self.model.terms() | {"reducer": self.reducer}


PrefillCost = CostBreakdown | ReducedCost
"""The cost of one prefill, without or with a reducer."""


def prefill_costs(
    shape: BackboneShape, connector: ConnectorConfig | None, reducer: ReducerConfig | None, budgets: Iterable[int]
) -> dict[int, PrefillCost]:
    """Computes the cost of one prefill with one image at each budget.

    Args:
        shape: dimensions of the backbone.
        connector: the model's connector.
        reducer: reducer of a model without compression; None: none.
        budgets: visual tokens per image.

    Raises:
        UnsupportedBudgetError: the reducer does not support a budget.
        UserError: the reducer does not fit the backbone.
    """
    if reducer is None:
        return {budget: cost(shape, connector, budget) for budget in sorted(budgets)}
    return {budget: reduced_cost(shape, reducer, budget) for budget in sorted(budgets)}


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
    if reducer is None:
        return cost(shape, None, budget, num_text_tokens=num_text_tokens).total
    return reduced_cost(shape, reducer, budget, num_text_tokens=num_text_tokens).total


def reduced_cost(
    shape: BackboneShape,
    reducer: ReducerConfig,
    budget: int,
    num_frames: int = 1,
    num_text_tokens: int | None = None,
) -> ReducedCost:
    """Computes the cost of one prefill with a reducer.

    Args:
        shape: dimensions of the backbone.
        reducer: configuration of the reducer.
        budget: visual tokens per image or frame; for a reducer inside the decoder, the mean over its layers.
        num_frames: number of images or frames, at least 1.
        num_text_tokens: number of text tokens of the prompt; None: `default_text_tokens`.

    Raises:
        UnsupportedBudgetError: the reducer does not support the budget.
        UserError: the reducer does not fit the backbone, or a number is out of range.
    """
    text = default_text_tokens(num_frames) if num_text_tokens is None else num_text_tokens
    patches = shape.num_patches
    full = cost(shape, None, patches, num_frames, text)
    built = build_reducer(reducer)
    _check(shape, built, budget)
    if budget == patches:
        return ReducedCost(full, 0, (num_frames * patches,) * shape.text_layers)
    if isinstance(built, InDecoderReducer):
        stages = built.stages(shape.text_layers, num_frames * patches, num_frames * budget)
        counts = [num_frames * patches, *(stage.num_tokens for stage in stages)]
        by_layer = tuple(tokens_by_layer(stages, shape.text_layers, num_frames * patches))
        return ReducedCost(
            _with_layers(shape, full, by_layer, text), _stage_flops(shape, built, counts, text), by_layer
        )
    model = cost(shape, None, budget, num_frames, text)
    own = _own_flops(shape, reducer, budget, num_frames, text)
    if isinstance(reducer, ToMeConfig):
        model = _with_merging_tower(shape, model, budget, num_frames)
    if not _is_before_the_projector(reducer):
        model = replace(model, projection=full.projection)
    return ReducedCost(model, own, (num_frames * budget,) * shape.text_layers)


def _check(shape: BackboneShape, reducer: TokenReducer, budget: int) -> None:
    """Raises `UserError` if the reducer does not fit the backbone, or `UnsupportedBudgetError` for the budget."""
    if reducer.reads == "encoder" and shape.vision_heads == 0:
        raise UserError(
            f"{reducer.name} reads the attention of the vision tower, but the convolutional tower of {shape.name} has"
            " none; choose a reducer that reads only the tokens, such as cluster_aggregate."
        )
    check_layer(reducer, shape.text_layers)
    legal = reducer.budgets_of(shape.num_patches, Depths(_feature_layers(shape), shape.text_layers))
    if budget not in legal:
        raise UnsupportedBudgetError(budget, legal, reducer.name)


def _is_before_the_projector(reducer: ReducerConfig) -> bool:
    if isinstance(reducer, SaliencyConfig):
        # With `merge_rest`, the other tokens are merged after the projector.
        return reducer.definition == "class_attention" and not reducer.merge_rest
    return isinstance(reducer, _BEFORE_THE_PROJECTOR)


def _own_flops(shape: BackboneShape, reducer: ReducerConfig, budget: int, num_frames: int, text: int) -> int:
    """Computes the own cost of a reducer before the decoder; see the module's docstring."""
    patches, visual = shape.num_patches, num_frames * shape.num_patches
    width, text_width = shape.vision_width, shape.text_width
    match reducer:
        case ClusterAggregateConfig() | DivPruneConfig():
            return num_frames * 2 * patches**2 * text_width
        case RestoreConfig():
            chosen = num_selected(reducer.share, budget)
            compared = patches**2 if reducer.base == "divprune" and chosen else 0
            return num_frames * 2 * (compared + (patches - chosen) ** 2) * text_width
        case SaliencyConfig():
            in_prompt = reducer.definition.endswith("text")
            # A prompt's images are compared with each other only by a reducer that reads the prompt.
            merging = 2 * visual * budget * text_width * (num_frames if in_prompt else 1) * reducer.merge_rest
            if not in_prompt:
                return merging
            return merging + reducer.layer * _layer(shape, visual, text) + _attention_flops(shape, visual + text, text)
        case VisionZipConfig():
            return num_frames * 2 * patches * num_contextual(budget) * width // shape.vision_heads
        case PruMergeConfig():
            return num_frames * 2 * patches * (budget - 1) * width
        case ScopeConfig():
            return num_frames * 2 * patches**2 * width
        case VisPrunerConfig():
            halves = halves_of(patches, budget, reducer.important)
            return num_frames * sum(2 * first * second * width for first, second in halves)
        case PruneSIDConfig():
            return num_frames * (4 * patches**2 * width + 9 * patches**3)
        case MMTokConfig():
            return 2 * visual * (visual + text) * text_width
        case ToMeConfig():
            halves = [(-(-count // 2), count // 2) for count, _ in _merges(shape, budget)]
            return num_frames * sum(2 * first * second * width // shape.vision_heads for first, second in halves)
        case _:
            return 0


def _stage_flops(shape: BackboneShape, reducer: InDecoderReducer, counts: Sequence[int], text: int) -> int:
    """Computes the own cost of a reducer inside the decoder.

    Args:
        shape: dimensions of the backbone.
        reducer: the reducer.
        counts: visual tokens before the first stage and after each stage.
        text: number of text tokens; SparseVLM's raters are counted as all of them.
    """
    if not isinstance(reducer, PyramidDrop | SparseVLM):
        # FastV reads the attention of the layer before, which runs on all tokens anyway.
        return 0
    key_width, query_width = shape.num_kv_heads * shape.head_dim, shape.num_heads * shape.head_dim
    rows = text if isinstance(reducer, SparseVLM) else 1
    total = 0
    for before, after in pairwise(counts):
        total += 2 * (before - after) * shape.text_width * key_width + 2 * rows * before * query_width
        if isinstance(reducer, SparseVLM):
            total += 2 * recycling_of(before, after).num_tokens ** 2 * shape.text_width
    if isinstance(reducer, SparseVLM) and len(counts) > 1:
        total += 2 * counts[0] * text * shape.text_width
    return total


def _attention_flops(shape: BackboneShape, num_keys: int, num_rows: int) -> int:
    """Computes the FLOPs of the attention probabilities of some rows of one decoder layer, with their projections."""
    keys = 2 * num_keys * shape.text_width * shape.num_kv_heads * shape.head_dim
    queries = 2 * num_rows * shape.text_width * shape.num_heads * shape.head_dim
    return keys + queries + 2 * num_rows * num_keys * shape.num_heads * shape.head_dim


def _layer(shape: BackboneShape, num_visual_tokens: int, num_text_tokens: int) -> int:
    """Computes the FLOPs of one decoder layer."""
    return _layers(replace(shape, text_layers=1), num_visual_tokens, num_text_tokens).decoder


def _layers(shape: BackboneShape, num_visual_tokens: int, num_text_tokens: int) -> CostBreakdown:
    """Computes the cost of the decoder for visual tokens of all images together."""
    # Counted as text, because the number of visual tokens of one image is limited to its patches.
    return cost(shape, None, 1, 0, num_visual_tokens + num_text_tokens)


def _with_layers(
    shape: BackboneShape, model: CostBreakdown, tokens_by_layer: Sequence[int], num_text_tokens: int
) -> CostBreakdown:
    """Returns the cost with another number of visual tokens in each layer of the decoder."""
    single = replace(shape, text_layers=1)
    costs = {count: _layers(single, count, num_text_tokens) for count in set(tokens_by_layer)}
    return replace(
        model,
        decoder_projections=sum(costs[count].decoder_projections for count in tokens_by_layer),
        decoder_attention=sum(costs[count].decoder_attention for count in tokens_by_layer),
        decoder_mlp=sum(costs[count].decoder_mlp for count in tokens_by_layer),
        kv_cache_bytes=sum(kv_cache_bytes(single, count + num_text_tokens) for count in tokens_by_layer),
    )


def _feature_layers(shape: BackboneShape) -> int:
    """Returns the number of layers of the vision tower up to the patch features."""
    return shape.vision_layers - shape.unused_vision_layers


def _merges(shape: BackboneShape, budget: int) -> Iterator[tuple[int, int]]:
    """Yields the patch tokens of each layer of ToMe's tower before and after its merging."""
    counts, tokens = merge_counts(shape.num_patches, budget, _feature_layers(shape)), shape.num_patches
    assert counts is not None, "the budget is legal"
    for count in counts:
        yield tokens, tokens - count
        tokens -= count


def _with_merging_tower(shape: BackboneShape, model: CostBreakdown, budget: int, num_frames: int) -> CostBreakdown:
    """Returns the cost with a vision tower that merges tokens in each layer, between attention and MLP."""
    width, extra = shape.vision_width, shape.class_tokens
    merges = [(before + extra, after + extra) for before, after in _merges(shape, budget)]
    return replace(
        model,
        vision_projections=num_frames * sum(8 * before * width**2 for before, _ in merges),
        vision_attention=num_frames * sum(4 * before**2 * width for before, _ in merges),
        vision_mlp=num_frames * sum(4 * after * width * shape.vision_mlp_width for _, after in merges),
    )
