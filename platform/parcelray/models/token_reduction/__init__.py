"""Training-free reducers of visual tokens: one reducer class per configuration class."""

from parcelray.config import reducer as configs
from parcelray.config.base import StrictModel
from parcelray.config.reducer import ReducerConfig
from parcelray.models.token_reduction.average_pooling import AveragePooling
from parcelray.models.token_reduction.base import Reduction, TokenReducer
from parcelray.models.token_reduction.cluster_aggregate import ClusterAggregate
from parcelray.models.token_reduction.divprune import DivPrune
from parcelray.models.token_reduction.fastv import FastV
from parcelray.models.token_reduction.mmtok import MMTok
from parcelray.models.token_reduction.prumerge import PruMerge
from parcelray.models.token_reduction.prunesid import PruneSID
from parcelray.models.token_reduction.pyramid_drop import PyramidDrop
from parcelray.models.token_reduction.restore import Restore
from parcelray.models.token_reduction.saliency import Saliency
from parcelray.models.token_reduction.sampling import RandomSampling, SpatialSampling
from parcelray.models.token_reduction.scope import Scope
from parcelray.models.token_reduction.sparsevlm import SparseVLM
from parcelray.models.token_reduction.tome import ToMe
from parcelray.models.token_reduction.visionzip import VisionZip
from parcelray.models.token_reduction.vispruner import VisPruner

__all__ = ["Reduction", "TokenReducer", "build_reducer"]

_CLASSES: dict[type[StrictModel], type[TokenReducer]] = {
    configs.ClusterAggregateConfig: ClusterAggregate,
    configs.RandomSamplingConfig: RandomSampling,
    configs.SpatialSamplingConfig: SpatialSampling,
    configs.AveragePoolingConfig: AveragePooling,
    configs.DivPruneConfig: DivPrune,
    configs.SaliencyConfig: Saliency,
    configs.VisionZipConfig: VisionZip,
    configs.ToMeConfig: ToMe,
    configs.PruMergeConfig: PruMerge,
    configs.ScopeConfig: Scope,
    configs.MMTokConfig: MMTok,
    configs.VisPrunerConfig: VisPruner,
    configs.PruneSIDConfig: PruneSID,
    configs.RestoreConfig: Restore,
    configs.FastVConfig: FastV,
    configs.PyramidDropConfig: PyramidDrop,
    configs.SparseVLMConfig: SparseVLM,
}


def build_reducer(config: ReducerConfig) -> TokenReducer:
    """Builds the reducer for a configuration."""
    return _CLASSES[type(config)](**config.model_dump(exclude={"type"}))
