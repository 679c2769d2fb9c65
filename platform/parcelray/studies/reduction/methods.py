"""The training-free methods of the reduction study, in the groups of its figure, and the budgets of each method."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from parcelray.config import reducer as configs
from parcelray.config.reducer import Positions, ReducerConfig
from parcelray.models.backbones.base import Depths
from parcelray.models.token_reduction import build_reducer
from parcelray.models.token_reduction.in_decoder import InDecoderReducer

Placement = Literal["image", "contiguous"]
"""Position ids of the remaining tokens: those of the full image (with or without size bias), or consecutive ones."""

RANDOM: Mapping[Placement, str] = {"image": "random", "contiguous": "random, contiguous"}
SPATIAL: Mapping[Placement, str] = {"image": "spatial", "contiguous": "spatial, contiguous"}
"""Names of the two baselines; a method is compared with the baselines of the same token placement."""
RANDOM_SEEDS = 5
"""Number of seeds of random sampling."""
RETENTIONS = (0.05, 0.11, 0.20, 0.30)
"""Shares of the visual tokens at which methods are compared (arXiv 2504.17892)."""
_EARLY, _OF_LAYERS = 2, 32
"""Decoder layer at which FastV ranks and prunes tokens, and the number of layers of its model, LLaVA-1.5-7B."""
_WINDOW = 4
"""Side of the windows in which the most attended patches are selected separately, patches."""

_CLUSTERS, _COVERAGE = "clusters and pooling (size bias)", "sampling and coverage"
ENCODER_ATTENTION, DECODER_ATTENTION = "attention of the vision tower", "attention of the decoder, and norm"
_INSIDE, _POSITIONS = "inside the decoder (mean over its layers)", "positions"


@dataclass(frozen=True)
class Method:
    """One reducer of the study."""

    reducer: ReducerConfig
    group: str

    @property
    def placement(self) -> Placement:
        """The placement of its tokens, which decides the baselines it is compared with."""
        return "contiguous" if self.reducer.positions == "contiguous" else "image"


def methods_of(depths: Depths) -> dict[str, Method]:
    """Returns the methods for a model with the given numbers of layers, by name.

    Methods keep image positions; merging methods add a size bias; a few are added with contiguous positions. Layers
    are the published ones of LLaVA-1.5-7B, scaled to the depth of the model, at least 1. Methods that read the
    attention of the vision tower are left out if the tower has none.
    """
    early = max(1, round(_EARLY * depths.decoder / _OF_LAYERS))
    image: Positions = "image"
    biased: Positions = "image_size_bias"
    methods = {
        "cluster": Method(configs.ClusterAggregateConfig(positions=biased), _CLUSTERS),
        "cluster, cosine": Method(configs.ClusterAggregateConfig(positions=biased, metric="cosine"), _CLUSTERS),
        "average pooling": Method(configs.AveragePoolingConfig(positions=biased), _CLUSTERS),
        "ToMe": Method(configs.ToMeConfig(positions=biased), _CLUSTERS),
        "RESTORE": Method(configs.RestoreConfig(), _CLUSTERS),
        SPATIAL["image"]: Method(configs.SpatialSamplingConfig(positions=image), _COVERAGE),
        "DivPrune": Method(configs.DivPruneConfig(positions=image), _COVERAGE),
        "SCOPE": Method(configs.ScopeConfig(positions=image), _COVERAGE),
        "MMTok": Method(configs.MMTokConfig(positions=image), _COVERAGE),
        "VisPruner": Method(configs.VisPrunerConfig(positions=image), _COVERAGE),
        "PruneSID": Method(configs.PruneSIDConfig(positions=image), _COVERAGE),
        "class attention": Method(configs.SaliencyConfig(positions=image), ENCODER_ATTENTION),
        "class attention, windows": Method(configs.SaliencyConfig(positions=image, window=_WINDOW), ENCODER_ATTENTION),
        "class attention, merged": Method(configs.SaliencyConfig(positions=biased, merge_rest=True), ENCODER_ATTENTION),
        "VisionZip": Method(configs.VisionZipConfig(positions=biased), ENCODER_ATTENTION),
        "PruMerge": Method(configs.PruMergeConfig(positions=image), ENCODER_ATTENTION),
        "PruMerge+": Method(configs.PruMergeConfig(positions=image, spatial=True), ENCODER_ATTENTION),
        "last word": Method(
            configs.SaliencyConfig(positions=image, definition="last_text", layer=early), DECODER_ATTENTION
        ),
        "mean of words": Method(
            configs.SaliencyConfig(positions=image, definition="mean_text", layer=early), DECODER_ATTENTION
        ),
        "last word, merged": Method(
            configs.SaliencyConfig(positions=biased, definition="last_text", layer=early, merge_rest=True),
            DECODER_ATTENTION,
        ),
        "norm": Method(configs.SaliencyConfig(positions=image, definition="norm"), DECODER_ATTENTION),
        "FastV": Method(configs.FastVConfig(layer=early), _INSIDE),
        "PyramidDrop": Method(configs.PyramidDropConfig(positions=image), _INSIDE),
        # The published stages start after a quarter of the layers, which alone costs 25 % of the tokens. In a shallow
        # decoder that is the early layer itself.
        **(
            {"PyramidDrop, early": Method(configs.PyramidDropConfig(positions=image, first_layer=early), _INSIDE)}
            if 4 * early < depths.decoder - 1
            else {}
        ),
        "SparseVLM": Method(configs.SparseVLMConfig(positions=image), _INSIDE),
        "cluster, no size bias": Method(configs.ClusterAggregateConfig(positions=image), _POSITIONS),
        "cluster, contiguous": Method(configs.ClusterAggregateConfig(), _POSITIONS),
        SPATIAL["contiguous"]: Method(configs.SpatialSamplingConfig(), _POSITIONS),
        "DivPrune, contiguous": Method(configs.DivPruneConfig(), _POSITIONS),
        "class attention, contiguous": Method(configs.SaliencyConfig(), _POSITIONS),
        "VisionZip, contiguous": Method(configs.VisionZipConfig(), _POSITIONS),
    }
    return {
        name: method
        for name, method in methods.items()
        if depths.encoder or build_reducer(method.reducer).reads != "encoder"
    }


def random_of(placement: Placement) -> list[Method]:
    """Returns random sampling with each seed."""
    return [
        Method(configs.RandomSamplingConfig(seed=seed, positions=placement), RANDOM[placement])
        for seed in range(RANDOM_SEEDS)
    ]


def groups_of(methods: Mapping[str, Method]) -> dict[str, list[str]]:
    """Returns the names of the methods by group."""
    groups: dict[str, list[str]] = {}
    for name, method in methods.items():
        groups.setdefault(method.group, []).append(name)
    return groups


def budgets_of(
    reducers: Iterable[ReducerConfig], num_tokens: int, depths: Depths, retentions: Sequence[float] = RETENTIONS
) -> tuple[int, ...]:
    """Returns the budgets nearest to the given shares that all of the reducers support, ascending and unique.

    A reducer inside the decoder cannot go below the cost of the layers before its first stage. If this rules out all
    shares except one, four equal steps between its smallest budget and all tokens are used instead.

    Args:
        reducers: the reducers.
        num_tokens: number of all visual tokens.
        depths: numbers of layers of the model.
        retentions: shares of the tokens.
    """
    built = [build_reducer(reducer) for reducer in reducers]
    common = set.intersection(*(set(each.budgets_of(num_tokens, depths)) for each in built))
    legal = sorted(budget for budget in common if budget < num_tokens)
    wanted = [share * num_tokens for share in retentions]
    if any(isinstance(each, InDecoderReducer) for each in built) and legal[0] > sorted(wanted)[:2][-1]:
        wanted = [legal[0] + step * (num_tokens - legal[0]) / len(retentions) for step in range(len(retentions))]
    return tuple(sorted({min(legal, key=lambda budget: abs(budget - each)) for each in wanted}))


def all_budgets(
    methods: Mapping[str, Method],
    num_tokens: int,
    depths: Depths,
    *,
    equal: bool,
    retentions: Sequence[float] = RETENTIONS,
) -> dict[str, tuple[int, ...]]:
    """Returns the budgets of each method, by name.

    Spatial sampling has the budgets of all methods with the same token placement, so that each can be compared.

    Args:
        methods: methods of the study.
        num_tokens: number of all visual tokens.
        depths: numbers of layers of the model.
        equal: whether all methods use the same budgets, which all of them support.
        retentions: shares of the tokens, see `budgets_of`.
    """
    shared = (
        budgets_of([method.reducer for method in methods.values()], num_tokens, depths, retentions) if equal else ()
    )
    budgets = {
        name: shared or budgets_of([method.reducer], num_tokens, depths, retentions) for name, method in methods.items()
    }
    for placement, name in SPATIAL.items():
        if name in methods:
            budgets[name] = union(budgets[other] for other, method in methods.items() if method.placement == placement)
    return budgets


def union(budgets: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Returns the union of several lists of budgets, ascending."""
    return tuple(sorted({budget for each in budgets for budget in each}))
