"""Training-free token reducers as data."""

from typing import Annotated, Literal

from pydantic import Field

from parcelray.config.base import StrictModel

Positions = Literal["contiguous", "original", "original_size_bias", "original_calibrated"]


class _ReducerConfig(StrictModel):
    """What every reducer has."""

    positions: Positions = "contiguous"
    """Rotary positions of the tokens that are left: one after the other; of their place in the image; besides with log(size) added to the attention
    logits of merged tokens; or with that and RESTORE's calibration for distance."""


class ClusterAggregateConfig(_ReducerConfig):
    """Means of K-means++ clusters of the projected tokens (arXiv 2504.17892)."""

    type: Literal["cluster_aggregate"] = "cluster_aggregate"
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Distance between tokens."""
    order: Literal["position", "random"] = "position"
    """Order of the aggregates."""
    weighting: Literal["mean", "norm"] = "mean"
    """How members weigh in their mean: alike, or by their length."""
    seeding: Literal["greedy", "plain"] = "greedy"
    """Whether the seeding tries several candidates a step."""
    max_iterations: int = Field(default=20, ge=0)
    """Lloyd iterations at most."""
    seed: int = Field(default=0, ge=0)
    """Seed of the seeding."""


class RandomSamplingConfig(_ReducerConfig):
    """Tokens at random places, the same for every image."""

    type: Literal["random_sampling"] = "random_sampling"
    seed: int = Field(default=0, ge=0)
    """Seed of the places; results need several."""


class SpatialSamplingConfig(_ReducerConfig):
    """Tokens spread evenly over the grid."""

    type: Literal["spatial_sampling"] = "spatial_sampling"


class AveragePoolingConfig(_ReducerConfig):
    """Means of the cells of a coarser grid; the budget must be a square number."""

    type: Literal["average_pooling"] = "average_pooling"


class DivPruneConfig(_ReducerConfig):
    """The tokens that differ most from each other (DivPrune, CVPR 2025)."""

    type: Literal["divprune"] = "divprune"


class SaliencyConfig(_ReducerConfig):
    """The tokens that an attention map, or their length, ranks highest."""

    type: Literal["saliency"] = "saliency"
    definition: Literal["class_attention", "last_text", "mean_text", "max_text", "norm"] = "class_attention"
    """Whose attention: the vision tower's class token; the prompt's last token, or all its tokens (mean, maximum) in a layer of the decoder; `norm`:
    no attention, but the token's length."""
    layer: int = Field(default=2, ge=0)
    """Layer of the decoder, counted from 0."""
    window: int | None = Field(default=None, ge=1)
    """Side in patches of windows that each give their most salient tokens; null: the whole image competes."""
    merge_rest: bool = False
    """Whether the others are averaged into the nearest kept token, or dropped."""


class VisionZipConfig(_ReducerConfig):
    """Dominant tokens by the class token's attention, contextual ones merged from the rest (VisionZip, CVPR 2025)."""

    type: Literal["visionzip"] = "visionzip"


class ToMeConfig(_ReducerConfig):
    """Tokens merged inside the vision tower (ToMe, ICLR 2023); a tower of n layers can halve them n times."""

    type: Literal["tome"] = "tome"


class PruMergeConfig(_ReducerConfig):
    """Patches by the class token's attention, with their nearest ones added (LLaVA-PruMerge, ICCV 2025)."""

    type: Literal["prumerge"] = "prumerge"
    spatial: bool = False
    """Adds evenly spaced patches (PruMerge+)."""


class ScopeConfig(_ReducerConfig):
    """Patches that cover the others, weighed by the class token's attention (SCOPE, NeurIPS 2025)."""

    type: Literal["scope"] = "scope"
    alpha: float = Field(default=1.0, ge=0)
    """How much the attention counts."""


class MMTokConfig(_ReducerConfig):
    """Tokens that cover the words of the prompt and all visual tokens (MMTok, 2025)."""

    type: Literal["mmtok"] = "mmtok"


class VisPrunerConfig(_ReducerConfig):
    """Attended patches, and the least duplicated of the rest (VisPruner, ICCV 2025)."""

    type: Literal["vispruner"] = "vispruner"
    important: float = Field(default=0.5, ge=0, le=1)
    """Share of the budget that attention chooses."""


class PruneSIDConfig(_ReducerConfig):
    """Attended patches of groups by principal components, without those that are alike (PruneSID, ICLR 2026)."""

    type: Literal["prunesid"] = "prunesid"


class RestoreConfig(_ReducerConfig):
    """Half chosen, half merged from the rest, with calibrated attention (RESTORE, ICML 2026)."""

    type: Literal["restore"] = "restore"
    positions: Positions = "original_calibrated"
    """See the other reducers."""
    base: Literal["divprune", "class_attention"] = "divprune"
    """What chooses the first half."""
    share: float = Field(default=0.5, ge=0, le=1)
    """Of the budget that the base chooses."""


class FastVConfig(_ReducerConfig):
    """Drops visual tokens after the decoder's first layers (FastV, ECCV 2024); the budget is the mean over the layers."""

    type: Literal["fastv"] = "fastv"
    positions: Positions = "original"
    """See the other reducers."""
    layer: int = Field(default=2, ge=1)
    """First layer of the decoder that sees fewer tokens."""


class PyramidDropConfig(_ReducerConfig):
    """Drops a share of the visual tokens after each quarter of the decoder (PyramidDrop, CVPR 2025); the budget is the mean over the layers."""

    type: Literal["pyramid_drop"] = "pyramid_drop"
    first_layer: int | None = Field(default=None, ge=1)
    """Layer of the decoder at the first of the three stages; null: a quarter of the layers."""


class SparseVLMConfig(_ReducerConfig):
    """Drops visual tokens at three depths by the words that matter, and recycles some (SparseVLM, ICML 2025); the budget is the layers' mean."""

    type: Literal["sparsevlm"] = "sparsevlm"


ReducerConfig = Annotated[
    ClusterAggregateConfig
    | RandomSamplingConfig
    | SpatialSamplingConfig
    | AveragePoolingConfig
    | DivPruneConfig
    | SaliencyConfig
    | VisionZipConfig
    | ToMeConfig
    | PruMergeConfig
    | ScopeConfig
    | MMTokConfig
    | VisPrunerConfig
    | PruneSIDConfig
    | RestoreConfig
    | FastVConfig
    | PyramidDropConfig
    | SparseVLMConfig,
    Field(discriminator="type"),
]
