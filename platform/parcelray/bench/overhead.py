"""`parcelray bench overhead`: compares the cost of a training-free reduction with the savings of the shorter prompt.

Measured for each reducer, batch size and budget: the time of the reduction, the time and memory saved in the decoder's
prefill, the time saved in later decoding steps, the net gain, and the break-even budget.

Reducers before the decoder are timed by themselves. ToMe replaces the plain run of the vision tower, so its time is the
difference to that run. Reducers inside the decoder, or by the prompt, run in the project's own loop over the decoder's
layers. Their gain is relative to this loop without a reduction. Their time is relative to this loop with the same
number of tokens at the same layers, where the first tokens are kept without computing any scores.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from parcelray.bench.measure import Measure, PairTiming, Report, machine_info, peak_memory_bytes, time_pairs
from parcelray.bench.workload import model_config, photographs, random_model
from parcelray.config import reducer as configs
from parcelray.config.reducer import Positions, ReducerConfig
from parcelray.errors import UserError
from parcelray.models.backbones import ElasticLlavaConfig, ElasticVLM
from parcelray.models.decoding import generate
from parcelray.models.reduced_decoder import Prompts, ReducedDecoder, VisualTokens
from parcelray.models.token_reduction import Reduction, TokenReducer, build_reducer
from parcelray.models.token_reduction.base import ReductionContext, selection
from parcelray.models.token_reduction.encoder_view import EncoderView
from parcelray.models.token_reduction.tome import ToMe
from parcelray.models.vlm import ElasticConfig
from parcelray.profiling.backbone_shapes import PRESETS, from_transformers_config, resolve_backbone
from parcelray.profiling.flops import kv_cache_bytes

REDUCERS: dict[str, ReducerConfig] = {
    "cluster_aggregate": configs.ClusterAggregateConfig(),
    "average_pooling": configs.AveragePoolingConfig(),
    "spatial_sampling": configs.SpatialSamplingConfig(),
    "random_sampling": configs.RandomSamplingConfig(),
    "divprune": configs.DivPruneConfig(),
    "saliency_class": configs.SaliencyConfig(),
    "saliency_last_text": configs.SaliencyConfig(definition="last_text"),
    "saliency_window": configs.SaliencyConfig(window=4),
    "visionzip": configs.VisionZipConfig(),
    "tome": configs.ToMeConfig(),
    "prumerge": configs.PruMergeConfig(),
    "scope": configs.ScopeConfig(),
    "mmtok": configs.MMTokConfig(),
    "vispruner": configs.VisPrunerConfig(),
    "prunesid": configs.PruneSIDConfig(),
    "restore": configs.RestoreConfig(positions="contiguous"),
    "fastv": configs.FastVConfig(),
    "pyramid_drop": configs.PyramidDropConfig(first_layer=2),
    "sparsevlm": configs.SparseVLMConfig(),
}
LAPTOP = "laptop"
_TEXT_TOKENS = 32
_NEW_TOKENS = 8
_CLUSTERING_GOAL = ("cluster_aggregate", 64, 8)
"""Reducer, budget and batch size of the goal: on a GPU, clustering takes at most 3 % of the prefill time it saves."""


@dataclass(frozen=True)
class _Setting:
    """A model with random weights and one batch of its inputs."""

    model: ElasticVLM
    view: EncoderView
    tokens_BND: Tensor
    prompts: Prompts
    kv_bytes_per_token: int

    @property
    def num_tokens(self) -> int:
        return self.tokens_BND.shape[1]

    @property
    def device(self) -> torch.device:
        return self.tokens_BND.device

    def answer(self, tokens_BKD: Tensor, new_tokens: int) -> Any:
        """Runs the prefill, which gives the first token, and the remaining decoding steps."""
        batch, count, _ = tokens_BKD.shape
        text_BT = self.prompts.after_BT
        ids_BS = torch.cat([text_BT.new_full((batch, count), self.model.config.image_token_id), text_BT], dim=1)
        inputs = {
            "input_ids": ids_BS,
            "attention_mask": torch.ones_like(ids_BS),
            "token_type_ids": torch.zeros_like(ids_BS),
            **self.model.image_inputs(tokens_BKD),
        }
        return generate(self.model, inputs, max_new_tokens=new_tokens, end_ids=frozenset(), pad_token_id=0)

    def answer_in_loop(
        self, reducer: TokenReducer | None, positions: Positions, budget: int, new_tokens: int
    ) -> Tensor:
        """Runs the same in the loop of the reduced decoder, with the reduction inside."""
        position_ids = torch.arange(self.num_tokens, device=self.device).expand(len(self.tokens_BND), -1)
        visual = VisualTokens(self.tokens_BND, position_ids, torch.ones_like(position_ids))
        decoder = ReducedDecoder(self.model, positions)
        return decoder.generate(
            self.prompts,
            visual,
            max_new_tokens=new_tokens,
            end_ids=frozenset(),
            pad_token_id=0,
            reducer=reducer,
            budget=budget,
        )

    def time(self, a: Callable[[], object], b: Callable[[], object], repeats: int) -> PairTiming:
        return time_pairs(a, b, repeats, synchronize=torch.cuda.synchronize if self.device.type == "cuda" else None)


def bench_overhead(
    *,
    budgets: Sequence[int],
    batch_sizes: Sequence[int],
    reducers: Sequence[str],
    repeats: int,
    backbone: str = LAPTOP,
    device: str = "cpu",
    resolution: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measures every reducer at every batch size and budget.

    Args:
        budgets: visual tokens per image; a reducer skips budgets that it does not support.
        batch_sizes: numbers of images per batch.
        reducers: names in `REDUCERS`.
        repeats: number of timed rounds.
        backbone: `laptop` (LLaVA with 576 visual tokens and 0.1 billion parameters), a preset (on a GPU), `mini`, or a
            folder.
        device: `cpu` or `cuda`.
        resolution: side of the image in pixels; None: the resolution of the backbone.
        say: called with each reducer when it starts; the whole bench takes minutes.

    Raises:
        UserError: the reducer, backbone or device is unknown, or the device is missing.
    """
    unknown = [name for name in reducers if name not in REDUCERS]
    if unknown:
        raise UserError(f"--reducers contains unknown names: {', '.join(unknown)}; legal: {', '.join(REDUCERS)}.")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(
            f"--device {device} is not available; choose"
            f" cpu{', or a machine with a CUDA device' if device == 'cuda' else ' or cuda'}."
        )
    if device == "cpu" and backbone in PRESETS:
        raise UserError(f"{backbone} needs a GPU for this bench; choose --device cuda, or the backbone {LAPTOP}.")
    config = _laptop() if backbone == LAPTOP else model_config(backbone, resolve_backbone(backbone, resolution))
    model = random_model(config, torch.device(device))
    measures: list[Measure] = []
    with torch.inference_mode():
        for batch_size in batch_sizes:
            setting = _setting(model, config, batch_size)
            legal = [budget for budget in budgets if budget < setting.num_tokens]
            saved = {}
            for budget in legal:
                saved[budget] = _Saved.measure(setting, budget, repeats)
                measures += saved[budget].measures(setting, budget)
            for name in reducers:
                say(f"{name}, batch {batch_size}")
                measures += _reducer(setting, name, saved, repeats)
    parameters = sum(each.numel() for each in model.parameters())
    return Report(
        tuple(measures),
        machine_info() | {"backbone": backbone, "parameters": f"{parameters / 1e6:.0f} M", "dtype": str(model.dtype)},
    )


@dataclass(frozen=True)
class _Saved:
    """Savings of a shorter prompt, in seconds and bytes."""

    prefill: float
    prefill_spread: float
    decode: float
    memory: int

    @classmethod
    def measure(cls, setting: _Setting, budget: int, repeats: int) -> "_Saved":
        full, short = setting.tokens_BND, setting.tokens_BND[:, :budget]
        first = setting.time(partial(setting.answer, full, 1), partial(setting.answer, short, 1), repeats)
        whole = setting.time(
            partial(setting.answer, full, 1 + _NEW_TOKENS), partial(setting.answer, short, 1 + _NEW_TOKENS), repeats
        )
        prefill = first.median_a - first.median_b
        memory = peak_memory_bytes(partial(setting.answer, full, 1), setting.device) - peak_memory_bytes(
            partial(setting.answer, short, 1), setting.device
        )
        return cls(prefill, first.spread_a + first.spread_b, whole.median_a - whole.median_b - prefill, memory)

    def measures(self, setting: _Setting, budget: int) -> list[Measure]:
        label = f"{setting.num_tokens} -> {budget}, batch {len(setting.tokens_BND)}"
        kv_bytes = (setting.num_tokens - budget) * setting.kv_bytes_per_token * len(setting.tokens_BND)
        return [
            Measure(f"{label}: prefill saved", 1000 * self.prefill, "ms", 1000 * self.prefill_spread),
            Measure(f"{label}: {_NEW_TOKENS} further steps saved", 1000 * self.decode, "ms"),
            Measure(f"{label}: peak memory of the prefill saved", self.memory / 2**20, "MiB"),
            Measure(f"{label}: KV cache saved", kv_bytes / 2**20, "MiB"),
        ]


def _reducer(setting: _Setting, name: str, saved: dict[int, _Saved], repeats: int) -> Iterator[Measure]:
    reducer = build_reducer(REDUCERS[name])
    batch = len(setting.tokens_BND)
    gains: dict[int, float] = {}
    cost = 0.0
    legal = reducer.budgets_of(setting.num_tokens, setting.model.config.depths)
    for budget, gain in saved.items():
        if budget not in legal:
            continue
        label = f"{name}, {setting.num_tokens} -> {budget}, batch {batch}"
        if reducer.reads == "prompt":
            price, gains[budget], spread = _inside(setting, reducer, budget, repeats)
        else:
            price, spread = _before(setting, reducer, budget, repeats)
            gains[budget] = gain.prefill + gain.decode - price
        cost = max(cost, price)
        goal = "<= 3" if setting.device.type == "cuda" and (name, budget, batch) == _CLUSTERING_GOAL else None
        against = "the plain run of the vision tower, which it replaces" if isinstance(reducer, ToMe) else None
        yield Measure(f"{label}: reduction", 1000 * price, "ms", 1000 * spread, against=against)
        if reducer.reads != "prompt":
            yield Measure(f"{label}: reduction over prefill saved", 100 * price / gain.prefill, "%", goal=goal)
        yield Measure(f"{label}: net gain", 1000 * gains[budget], "ms", 1000 * spread)
    if gains:
        zero = _break_even(gains, setting.num_tokens, cost)
        yield Measure(
            f"{name}, batch {batch}: break-even budget",
            zero,
            "tokens",
            against="by linear interpolation; smaller budgets have a net gain",
        )


def _before(setting: _Setting, reducer: TokenReducer, budget: int, repeats: int) -> tuple[float, float]:
    """Returns the seconds of a reduction before the decoder, and their spread."""
    call = partial(_reduce, setting, reducer, budget)
    if isinstance(reducer, ToMe):
        timing = setting.time(
            call, partial(setting.model.model.encode_patches, setting.view.pixel_values_ICHW), repeats
        )
        return timing.median_a - timing.median_b, timing.spread_a + timing.spread_b
    timing = setting.time(call, call, repeats)
    return timing.median_a, timing.spread_a


def _inside(setting: _Setting, reducer: TokenReducer, budget: int, repeats: int) -> tuple[float, float, float]:
    """Returns the seconds of a reduction in the decoder's loop, the seconds it saves there, and the spread of both."""
    run = partial(setting.answer_in_loop, positions=reducer.positions, budget=budget, new_tokens=1 + _NEW_TOKENS)
    price = setting.time(partial(run, reducer), partial(run, _without_scores(reducer)), repeats)
    whole = setting.time(partial(run, None), partial(run, reducer), repeats)
    return price.median_a - price.median_b, whole.median_a - whole.median_b, whole.spread_a + whole.spread_b


def _without_scores(reducer: TokenReducer) -> TokenReducer:
    """Returns a reducer that keeps the same number of tokens at the same layers, but always the first tokens."""

    def reduce(self: TokenReducer, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        return selection(
            tokens_BND, torch.arange(num_visual_tokens, device=tokens_BND.device).expand(len(tokens_BND), -1)
        )

    blind = type("WithoutScores", (type(reducer),), {"reduce": reduce})
    return cast(TokenReducer, blind(**vars(reducer)))


def _break_even(gains: dict[int, float], num_tokens: int, cost: float) -> float:
    """Returns the budget at which the net gain is 0, by linear interpolation; 0 if no measured budget has a gain.

    Args:
        gains: net gain in seconds by budget.
        num_tokens: the full budget, at which nothing is saved.
        cost: cost of the reduction at the full budget, in seconds.
    """
    ordered = [*sorted(gains.items()), (num_tokens, -cost)]
    if ordered[0][1] <= 0:
        return 0.0
    for (a, gain_a), (b, gain_b) in pairwise(ordered):
        if gain_b <= 0:
            return a + (b - a) * gain_a / (gain_a - gain_b)
    return float(num_tokens)


def _reduce(setting: _Setting, reducer: TokenReducer, budget: int) -> object:
    # A new view each time, because a view caches the attention maps that it computes.
    view = setting.view.without_maps() if reducer.reads == "encoder" else setting.view
    return reducer(setting.tokens_BND, num_visual_tokens=budget, context=ReductionContext(encoder=view))


def _setting(model: ElasticVLM, config: ElasticConfig, batch_size: int) -> _Setting:
    device = next(model.parameters()).device
    pixels = photographs(batch_size, int(config.vision_config.image_size)).to(device, model.dtype)
    view = EncoderView(model.model, pixels)
    text_BT = torch.arange(_TEXT_TOKENS, device=device).expand(batch_size, -1) + 10
    ones_BT = torch.ones_like(text_BT, dtype=torch.bool)
    prompts = Prompts(torch.zeros(0, dtype=torch.int64, device=device), text_BT, ones_BT, ~ones_BT)
    kv_bytes = kv_cache_bytes(from_transformers_config(config), 1, bytes_per_value=model.dtype.itemsize)
    return _Setting(model, view, view.project(view.patch_features_IND), prompts, kv_bytes)


def _laptop() -> ElasticLlavaConfig:
    """Returns a LLaVA configuration with 576 visual tokens that a laptop can run.

    It is wide enough for matrix products to dominate the time, as in LLaVA-1.5.
    """
    return ElasticLlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 336,
            "patch_size": 14,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 768,
            "intermediate_size": 2304,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "head_dim": 64,
            "vocab_size": 2048,
            "max_position_embeddings": 4096,
        },
        image_token_index=2047,
    )
