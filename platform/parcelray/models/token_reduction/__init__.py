"""Training-free reducers of visual tokens: one configuration class, one reducer class."""

from parcelray.config.base import StrictModel
from parcelray.config.reducer import (
    AveragePoolingConfig,
    ClusterAggregateConfig,
    DivPruneConfig,
    RandomSamplingConfig,
    ReducerConfig,
    SpatialSamplingConfig,
)
from parcelray.models.token_reduction.average_pooling import AveragePooling
from parcelray.models.token_reduction.base import Reduction, TokenReducer
from parcelray.models.token_reduction.cluster_aggregate import ClusterAggregate
from parcelray.models.token_reduction.divprune import DivPrune
from parcelray.models.token_reduction.random_sampling import RandomSampling
from parcelray.models.token_reduction.spatial_sampling import SpatialSampling

__all__ = ["Reduction", "TokenReducer", "build_reducer"]

_CLASSES: dict[type[StrictModel], type[TokenReducer]] = {
    ClusterAggregateConfig: ClusterAggregate,
    RandomSamplingConfig: RandomSampling,
    SpatialSamplingConfig: SpatialSampling,
    AveragePoolingConfig: AveragePooling,
    DivPruneConfig: DivPrune,
}


def build_reducer(config: ReducerConfig) -> TokenReducer:
    """The reducer that a configuration names."""
    return _CLASSES[type(config)](**config.model_dump(exclude={"type"}))
