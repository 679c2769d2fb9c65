"""The training-free methods of a study, in the groups that its figure shows."""

from collections.abc import Mapping
from dataclasses import dataclass

from parcelray.config import reducer as configs
from parcelray.config.reducer import ReducerConfig
from parcelray.models.backbones.base import Depths
from parcelray.models.token_reduction import build_reducer
from parcelray.models.token_reduction.in_decoder import InDecoderReducer

RANDOM, RANDOM_ORIGINAL = "random", "random, original positions"
"""The two baselines: a method is held against the one whose tokens are placed as its own are."""
RANDOM_SEEDS = 5
RETENTIONS = (0.05, 0.11, 0.20, 0.30)
"""Shares of the visual tokens (arXiv 2504.17892)."""


@dataclass(frozen=True)
class Method:
    """One reducer in the study."""

    reducer: ReducerConfig
    group: str


METHODS: Mapping[str, Method] = {
    "cluster": Method(configs.ClusterAggregateConfig(), "clusters and pooling"),
    "cluster, cosine": Method(configs.ClusterAggregateConfig(metric="cosine"), "clusters and pooling"),
    "cluster, random order": Method(configs.ClusterAggregateConfig(order="random"), "clusters and pooling"),
    "average pooling": Method(configs.AveragePoolingConfig(), "clusters and pooling"),
    "ToMe": Method(configs.ToMeConfig(), "clusters and pooling"),
    "cluster, original positions": Method(configs.ClusterAggregateConfig(positions="original"), "positions"),
    "cluster, size bias": Method(configs.ClusterAggregateConfig(positions="original_size_bias"), "positions"),
    "average pooling, size bias": Method(configs.AveragePoolingConfig(positions="original_size_bias"), "positions"),
    "spatial, original positions": Method(configs.SpatialSamplingConfig(positions="original"), "positions"),
    "DivPrune, original positions": Method(configs.DivPruneConfig(positions="original"), "positions"),
    "class attention, original positions": Method(configs.SaliencyConfig(positions="original"), "positions"),
    "RESTORE": Method(configs.RestoreConfig(), "positions"),
    "spatial": Method(configs.SpatialSamplingConfig(), "sampling and coverage"),
    "DivPrune": Method(configs.DivPruneConfig(), "sampling and coverage"),
    "SCOPE": Method(configs.ScopeConfig(), "sampling and coverage"),
    "VisPruner": Method(configs.VisPrunerConfig(), "sampling and coverage"),
    "class attention": Method(configs.SaliencyConfig(), "attention of the vision tower"),
    "class attention, merged": Method(configs.SaliencyConfig(merge_rest=True), "attention of the vision tower"),
    "VisionZip": Method(configs.VisionZipConfig(), "attention of the vision tower"),
    "PruMerge": Method(configs.PruMergeConfig(), "attention of the vision tower"),
    "PruMerge+": Method(configs.PruMergeConfig(spatial=True), "attention of the vision tower"),
    "last word": Method(configs.SaliencyConfig(definition="last_text", layer=1), "attention of the decoder"),
    "mean of words": Method(configs.SaliencyConfig(definition="mean_text", layer=1), "attention of the decoder"),
    "last word, merged": Method(configs.SaliencyConfig(definition="last_text", layer=1, merge_rest=True), "attention of the decoder"),
    "norm": Method(configs.SaliencyConfig(definition="norm"), "attention of the decoder"),
    "FastV": Method(configs.FastVConfig(layer=1), "inside the decoder (mean over its layers)"),
    "PyramidDrop": Method(configs.PyramidDropConfig(), "inside the decoder (mean over its layers)"),
    "SparseVLM": Method(configs.SparseVLMConfig(), "inside the decoder (mean over its layers)"),
    **{f"{RANDOM}, seed {seed}": Method(configs.RandomSamplingConfig(seed=seed), RANDOM) for seed in range(RANDOM_SEEDS)},
    **{
        f"{RANDOM_ORIGINAL}, seed {seed}": Method(configs.RandomSamplingConfig(seed=seed, positions="original"), RANDOM_ORIGINAL)
        for seed in range(RANDOM_SEEDS)
    },
}


def baseline_of(method: Method) -> str:
    """The random sampling that places its tokens as the method does."""
    return RANDOM if method.reducer.positions == "contiguous" else RANDOM_ORIGINAL


def groups() -> dict[str, list[str]]:
    """Methods by group, without random sampling, which every panel shows."""
    found: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        if method.group not in (RANDOM, RANDOM_ORIGINAL):
            found.setdefault(method.group, []).append(name)
    return found


def budgets_of(reducer: ReducerConfig, num_tokens: int, depths: Depths) -> tuple[int, ...]:
    """The budgets nearest to the retentions that a reducer can give, ascending, each once.

    A reducer inside the decoder cannot go below what the layers before its first stage cost; where that rules out all retentions but one, it is
    asked at four steps between there and everything instead.
    """
    built = build_reducer(reducer)
    legal = [budget for budget in built.budgets_of(num_tokens, depths) if budget < num_tokens]
    wanted = [share * num_tokens for share in RETENTIONS]
    if isinstance(built, InDecoderReducer) and legal[0] > wanted[1]:
        wanted = [legal[0] + step * (num_tokens - legal[0]) / len(RETENTIONS) for step in range(len(RETENTIONS))]
    return tuple(sorted({min(legal, key=lambda budget: abs(budget - each)) for each in wanted}))
