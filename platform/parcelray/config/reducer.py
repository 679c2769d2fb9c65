"""Configuration of training-free token reducers."""

import json
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from parcelray.config.base import StrictModel

FORMER_POSITIONS = {
    "image": "original",
    "image_size_bias": "original_size_bias",
    "image_calibrated": "original_calibrated",
}
"""Former names of positions, by name: those in stored jobs, run identities and prediction keys."""
_NAMES = {former: name for name, former in FORMER_POSITIONS.items()}
Positions = Annotated[
    Literal["contiguous", "image", "image_size_bias", "image_calibrated"],
    BeforeValidator(lambda value: _NAMES.get(value, value) if isinstance(value, str) else value),
]


class _ReducerConfig(StrictModel):
    """Common settings of all reducers."""

    positions: Positions = "contiguous"
    """Rotary positions of the remaining tokens.

    `contiguous`: consecutive positions; `image`: the positions in the image; `image_size_bias`: also adds
    log(size) to the attention logits of merged tokens; `image_calibrated`: adds RESTORE's distance calibration, too.
    """

    def to_json(self) -> str:
        """Returns the settings as JSON with the former names of positions, so that prediction keys stay valid."""
        values = self.model_dump(mode="json")
        former = FORMER_POSITIONS.get(self.positions, self.positions)
        return json.dumps(values | {"positions": former}, separators=(",", ":"))


class ClusterAggregateConfig(_ReducerConfig):
    """Means of K-means++ clusters of the projected tokens (arXiv 2504.17892)."""

    type: Literal["cluster_aggregate"] = "cluster_aggregate"
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Distance measure between tokens."""
    order: Literal["position", "random"] = "position"
    """Order of the aggregated tokens."""
    weighting: Literal["mean", "norm"] = "mean"
    """Weights of a cluster's tokens in its mean: equal (`mean`), or proportional to the token's norm (`norm`)."""
    seeding: Literal["greedy", "plain"] = "greedy"
    """K-means++ seeding: `greedy` tries several candidates per step, `plain` one."""
    max_iterations: int = Field(default=20, ge=0)
    """Largest number of Lloyd iterations."""
    seed: int = Field(default=0, ge=0)
    """Random seed of the K-means++ seeding."""


class RandomSamplingConfig(_ReducerConfig):
    """Tokens at random positions, the same for every image."""

    type: Literal["random_sampling"] = "random_sampling"
    seed: int = Field(default=0, ge=0)
    """Random seed of the positions; report results over several seeds."""


class SpatialSamplingConfig(_ReducerConfig):
    """Tokens sampled evenly over the patch grid."""

    type: Literal["spatial_sampling"] = "spatial_sampling"


class AveragePoolingConfig(_ReducerConfig):
    """Average pooling to a coarser grid; the budget must be a square number."""

    type: Literal["average_pooling"] = "average_pooling"


class DivPruneConfig(_ReducerConfig):
    """The tokens that differ most from each other (DivPrune, CVPR 2025)."""

    type: Literal["divprune"] = "divprune"


class SaliencyConfig(_ReducerConfig):
    """The tokens with the highest saliency: attention received, or the token's norm."""

    type: Literal["saliency"] = "saliency"
    definition: Literal["class_attention", "last_text", "mean_text", "max_text", "norm"] = "class_attention"
    """Definition of saliency.

    `class_attention`: attention of the vision tower's class token. `last_text`, `mean_text`, `max_text`: attention of
    the prompt's last token, or the mean or maximum over all its tokens, in one decoder layer. `norm`: the token's norm.
    """
    layer: int = Field(default=2, ge=0)
    """Index of the decoder layer for the definitions over text, from 0."""
    window: int | None = Field(default=None, ge=1)
    """Side of the windows in patches; each window keeps its most salient tokens. null: one window, the whole image."""
    merge_rest: bool = False
    """Whether the other tokens are averaged into the nearest kept token; false: they are dropped."""


class VisionZipConfig(_ReducerConfig):
    """Dominant tokens by the class token's attention, contextual ones merged from the rest (VisionZip, CVPR 2025)."""

    type: Literal["visionzip"] = "visionzip"


class ToMeConfig(_ReducerConfig):
    """Tokens merged inside the vision tower (ToMe, ICLR 2023); each layer can at most halve their number."""

    type: Literal["tome"] = "tome"


class PruMergeConfig(_ReducerConfig):
    """Patches chosen by the class token's attention, merged with their nearest ones (LLaVA-PruMerge, ICCV 2025)."""

    type: Literal["prumerge"] = "prumerge"
    spatial: bool = False
    """Whether evenly spaced patches are added (PruMerge+)."""


class ScopeConfig(_ReducerConfig):
    """Patches that cover the others, weighted by the class token's attention (SCOPE, NeurIPS 2025)."""

    type: Literal["scope"] = "scope"
    alpha: float = Field(default=1.0, ge=0)
    """Exponent of the attention weights."""


class MMTokConfig(_ReducerConfig):
    """Tokens that cover the words of the prompt and all visual tokens (MMTok, 2025)."""

    type: Literal["mmtok"] = "mmtok"


class VisPrunerConfig(_ReducerConfig):
    """The most attended patches, and the least redundant of the rest (VisPruner, ICCV 2025)."""

    type: Literal["vispruner"] = "vispruner"
    important: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the budget that is chosen by attention."""


class PruneSIDConfig(_ReducerConfig):
    """Attended patches of principal-component groups, without near-duplicates (PruneSID, ICLR 2026)."""

    type: Literal["prunesid"] = "prunesid"


class RestoreConfig(_ReducerConfig):
    """Selected tokens plus merged tokens of the rest, with calibrated attention (RESTORE, ICML 2026)."""

    type: Literal["restore"] = "restore"
    positions: Positions = "image_calibrated"
    """Rotary positions of the remaining tokens, as for the other reducers."""
    base: Literal["divprune", "class_attention"] = "divprune"
    """Method that selects the kept tokens."""
    share: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the budget that `base` selects."""


class FastVConfig(_ReducerConfig):
    """Drops visual tokens after the decoder's first layers (FastV, ECCV 2024); the budget is the mean over layers."""

    type: Literal["fastv"] = "fastv"
    positions: Positions = "image"
    """Rotary positions of the remaining tokens, as for the other reducers."""
    layer: int = Field(default=2, ge=1)
    """Index of the first decoder layer that processes fewer tokens, less than the number of layers."""


class PyramidDropConfig(_ReducerConfig):
    """Drops a fraction of the visual tokens at three depths of the decoder (PyramidDrop, CVPR 2025).

    The budget is the mean over the layers.
    """

    type: Literal["pyramid_drop"] = "pyramid_drop"
    first_layer: int | None = Field(default=None, ge=1)
    """Index of the decoder layer of the first of the three stages.

    null: a quarter of the layers; 2, or else 1, for budgets that a quarter of the layers exceeds.
    """


class SparseVLMConfig(_ReducerConfig):
    """Drops visual tokens at three depths by attention of relevant words, and recycles some (SparseVLM, ICML 2025).

    The budget is the mean over the layers.
    """

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
