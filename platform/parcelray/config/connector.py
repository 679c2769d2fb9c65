"""Configuration of connectors: the module between vision tower and language model, and how it routes a budget."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from parcelray.config.base import StrictModel


class RouteConfig(StrictModel):
    """One routing interval: the anchor grid for all budgets from `min_budget` to `max_budget`, both included."""

    min_budget: int = Field(ge=1)
    """Smallest budget of the interval, in visual tokens per image."""
    max_budget: int = Field(ge=1)
    """Largest budget of the interval, in visual tokens per image."""
    anchor_grid: int = Field(ge=0)
    """Side of the square anchor grid; 0: no anchors."""

    @model_validator(mode="after")
    def _check(self) -> "RouteConfig":
        if self.max_budget < self.min_budget:
            raise ValueError(f"max_budget {self.max_budget} is below min_budget {self.min_budget}; swap them")
        if self.min_budget < self.anchor_grid**2:
            raise ValueError(
                f"min_budget {self.min_budget} is smaller than the {self.anchor_grid**2} anchors of a"
                f" {self.anchor_grid} x {self.anchor_grid} grid; raise min_budget or use a smaller anchor_grid"
            )
        return self


class PlacedConnectorConfig(StrictModel):
    """Common settings of all connectors that compress, whose tokens therefore have places of their own."""

    positions: Literal["image", "contiguous"] = "image"
    """Rotary positions in the language model.

    `image`: each visual token has the position of its place in the image, and the text stands where it would without
    compression; `contiguous`: all tokens are numbered one after the other.
    """


class AttentionConnectorConfig(PlacedConnectorConfig):
    """Common settings of all connectors with attention blocks."""

    num_heads: int = Field(default=12, ge=1)
    """Number of attention heads; must divide the vision width D_v (in the paper 12, for a width of 1152)."""
    mlp_width: int | None = Field(default=None, ge=1)
    """Width of the block's MLP; null: the MLP width of the vision tower (4304 for SigLIP-So400m)."""


class QueryConnectorConfig(AttentionConnectorConfig):
    """Common settings of PARCEL and of its ablations with queries."""

    start: Literal["local", "random"] = "local"
    """Initial values of the query path.

    `local`: each query starts as a local average of the patches around its place; `random`: random projections and a
    random query bank. It decides the modules of the path, so a checkpoint keeps it.
    """


class IdentityConnectorConfig(StrictModel):
    """No compression: the patch features pass unchanged; the only legal budget is the number of patches.

    It has no key `positions`: with all patches, both kinds are the same.
    """

    type: Literal["identity"] = "identity"


class ParcelConnectorConfig(QueryConnectorConfig):
    """PARCEL: pooled anchors and pool-conditioned queries (arXiv 2605.30126, Section 3)."""

    type: Literal["parcel"] = "parcel"
    routing: tuple[RouteConfig, ...] | None = None
    """Routing intervals, ascending and disjoint; null: the paper's rule for patch grids of 16 x 16 or 32 x 32."""
    anchor_grids: tuple[int, ...] = ()
    """Sides of further anchor grids that a step may use, for a supernet over anchor/query splits; 0: no anchors.

    The query bank is large enough for all of them.
    """


class MqtConnectorConfig(AttentionConnectorConfig):
    """MQT: a query resampler with nested dropout of the query bank (baseline of arXiv 2605.30126, Appendix E)."""

    type: Literal["mqt"] = "mqt"
    start: Literal["local", "random", "sincos"] = "local"
    """Initial values of the query path.

    `local` and `random`: as for the connector parcel; `sincos`: as `random`, but the bank starts with the
    two-dimensional sine-cosine positions of a grid in raster order, as in the released code.
    """
    keys: Literal["content", "position"] = "content"
    """Source of the attention keys.

    `content`: the patch features; `position`: sine-cosine positions only, as in the released code.
    """
    num_queries: int = Field(default=256, ge=1)
    """Size of the query bank, the largest budget."""


class M3ConnectorConfig(PlacedConnectorConfig):
    """M3: average pooling of the patch grid to a square grid, one scale per budget (arXiv 2405.17430)."""

    type: Literal["m3"] = "m3"
    variant: Literal["release", "parcel_baseline"] | None = None
    """Definition of M3.

    `release`: as in M3's released code, the projected tokens are pooled, and the smallest scale is one token.
    `parcel_baseline`: as in the baseline of arXiv 2605.30126, Appendix E, the patch features are pooled before the
    projector, and the smallest scale is the last one that halves the grid. null: `release` for the two-layer projector
    of LLaVA; `parcel_baseline` for the linear projector of PaliGemma, where both give the same tokens.
    """


class AnchorsOnlyConnectorConfig(PlacedConnectorConfig):
    """Ablation: one anchor grid and no queries, hence a single budget."""

    type: Literal["anchors_only"] = "anchors_only"
    anchor_grid: int = Field(default=4, ge=1)
    """Side of the square anchor grid; the budget is its square."""


class FixedAnchorsConnectorConfig(QueryConnectorConfig):
    """Ablation: PARCEL with the same anchor grid at every budget."""

    type: Literal["fixed_anchors"] = "fixed_anchors"
    anchor_grid: int = Field(default=4, ge=1)
    """Side of the square anchor grid, used at every budget."""
    max_budget: int | None = Field(default=None, ge=1)
    """Largest budget; null: the number of patches."""


class VitCrossAttentionConnectorConfig(QueryConnectorConfig):
    """Ablation: queries cross-attend to the patch features only, without conditioning on the anchors."""

    type: Literal["vit_cross_attention"] = "vit_cross_attention"
    routing: tuple[RouteConfig, ...] | None = None
    """Routing intervals, as for the connector parcel."""


class DualCrossAttentionConnectorConfig(QueryConnectorConfig):
    """Ablation: queries cross-attend to the anchors, then to the patch features."""

    type: Literal["dual_cross_attention"] = "dual_cross_attention"
    routing: tuple[RouteConfig, ...] | None = None
    """Routing intervals, as for the connector parcel."""


class MqtSelfAttentionConnectorConfig(QueryConnectorConfig):
    """Ablation: MQT with a self-attention block over the queries, with the capacity of PARCEL."""

    type: Literal["mqt_self_attention"] = "mqt_self_attention"
    num_queries: int = Field(default=256, ge=1)
    """Size of the query bank, the largest budget."""


class M3SelfAttentionConnectorConfig(AttentionConnectorConfig):
    """Ablation: M3 with attention blocks over the pooled tokens, with the capacity of PARCEL."""

    type: Literal["m3_self_attention"] = "m3_self_attention"


ConnectorConfig = Annotated[
    IdentityConnectorConfig
    | ParcelConnectorConfig
    | MqtConnectorConfig
    | M3ConnectorConfig
    | AnchorsOnlyConnectorConfig
    | FixedAnchorsConnectorConfig
    | VitCrossAttentionConnectorConfig
    | DualCrossAttentionConnectorConfig
    | MqtSelfAttentionConnectorConfig
    | M3SelfAttentionConnectorConfig,
    Field(discriminator="type"),
]

FORMER_CONNECTOR_VALUES = {"start": "random", "positions": "contiguous"}
"""Values of the keys that the connector section of stored jobs and checkpoints lacks if it is older than the keys."""
