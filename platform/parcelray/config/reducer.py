"""Training-free token reducers as data."""

from typing import Annotated, Literal

from pydantic import Field

from parcelray.config.base import StrictModel


class ClusterAggregateConfig(StrictModel):
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


class RandomSamplingConfig(StrictModel):
    """Tokens at random places, the same for every image."""

    type: Literal["random_sampling"] = "random_sampling"
    seed: int = Field(default=0, ge=0)
    """Seed of the places; results need several."""


class SpatialSamplingConfig(StrictModel):
    """Tokens spread evenly over the grid."""

    type: Literal["spatial_sampling"] = "spatial_sampling"


class AveragePoolingConfig(StrictModel):
    """Means of the cells of a coarser grid; the budget must be a square number."""

    type: Literal["average_pooling"] = "average_pooling"


class DivPruneConfig(StrictModel):
    """The tokens that differ most from each other (DivPrune, CVPR 2025)."""

    type: Literal["divprune"] = "divprune"


ReducerConfig = Annotated[
    ClusterAggregateConfig | RandomSamplingConfig | SpatialSamplingConfig | AveragePoolingConfig | DivPruneConfig, Field(discriminator="type")
]
