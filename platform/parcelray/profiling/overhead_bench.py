"""`parcelray bench overhead`: what a training-free reduction costs against what the shorter prompt saves, side by side in one run.

For each reducer, batch size and budget: the time of the reduction, the time and KV-cache bytes that the decoder's prefill and its later steps
save, the net gain, and the largest budget at which there still is one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from parcelray.config.model import MiniModelConfig
from parcelray.config.reducer import AveragePoolingConfig, ClusterAggregateConfig, DivPruneConfig, RandomSamplingConfig, ReducerConfig, SpatialSamplingConfig
from parcelray.errors import UserError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor
from parcelray.models.checkpoint import MINI_BASE, resolve_checkpoint
from parcelray.models.mini import build_config, build_model
from parcelray.models.token_reduction import TokenReducer, build_reducer
from parcelray.models.vlm import use_sdpa_where_exact
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.kmeans_bench import SIDE, photograph_tokens
from parcelray.profiling.kv_cache import kv_cache_bytes
from parcelray.profiling.measure import Measure, Report, machine_info, time_pairs

REDUCERS: dict[str, ReducerConfig] = {
    "cluster_aggregate": ClusterAggregateConfig(),
    "average_pooling": AveragePoolingConfig(),
    "spatial_sampling": SpatialSamplingConfig(),
    "random_sampling": RandomSamplingConfig(),
    "divprune": DivPruneConfig(),
}
_TEXT_TOKENS = 32
_NEW_TOKENS = 8
# A decoder that fits a laptop and is wide enough for its products to count: 576 visual tokens, 0.1 billion parameters.
_DECODER = MiniModelConfig(
    image_size=96, vision_width=24, vision_layers=1, vision_heads=2, vision_mlp_width=32,
    text_width=768, text_layers=12, text_heads=12, text_kv_heads=4, text_head_dim=64, text_mlp_width=2304,
)  # fmt: skip


@dataclass(frozen=True)
class _Decoder:
    """A language model with random weights, fed with visual tokens."""

    model: ElasticVLM
    width: int
    kv_bytes_per_token: int

    def answer(self, tokens_BKD: Tensor, new_tokens: int) -> Any:
        """Prefill, and so many further steps."""
        batch, count, _ = tokens_BKD.shape
        text_BT = torch.arange(_TEXT_TOKENS, device=tokens_BKD.device).expand(batch, -1) + 10
        placeholders_BK = text_BT.new_full((batch, count), self.model.config.image_token_id)
        ids_BS = torch.cat([placeholders_BK, text_BT], dim=1)
        return self.model.generate(
            input_ids=ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            token_type_ids=torch.zeros_like(ids_BS),
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=tokens_BKD)},
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )


def bench_overhead(*, budgets: list[int], batch_sizes: list[int], reducers: list[str], repeats: int) -> Report:
    """Every reducer at every batch size and budget.

    Args:
        budgets: visual tokens of 576; average pooling takes those that are square numbers.
        batch_sizes: images at a time.
        reducers: names out of `REDUCERS`.
        repeats: timed rounds.

    Raises:
        UserError: there is no such reducer.
    """
    unknown = [name for name in reducers if name not in REDUCERS]
    if unknown:
        raise UserError(f"--reducers names {', '.join(unknown)}; legal: {', '.join(REDUCERS)}.")
    decoder = _decoder()
    measures: list[Measure] = []
    for batch_size in batch_sizes:
        tokens = photograph_tokens(batch_size, decoder.width)
        saved = {budget: _saved(decoder, tokens, budget, repeats) for budget in budgets}
        for budget in budgets:
            prefill, decode = saved[budget]
            label = f"{SIDE * SIDE} -> {budget}, batch {batch_size}"
            kv_bytes = (SIDE * SIDE - budget) * decoder.kv_bytes_per_token * batch_size
            measures += [
                Measure(f"{label}: prefill saved", 1000 * prefill, "ms"),
                Measure(f"{label}: {_NEW_TOKENS} further steps saved", 1000 * decode, "ms"),
                Measure(f"{label}: KV cache saved", kv_bytes / 2**20, "MiB"),
            ]
        for name in reducers:
            measures += _reducer(name, tokens, saved, repeats)
    return Report(tuple(measures), machine_info() | {"decoder": f"{sum(each.numel() for each in decoder.model.parameters()) / 1e6:.0f} M parameters, fp32"})


def _saved(decoder: _Decoder, tokens: Tensor, budget: int, repeats: int) -> tuple[float, float]:
    """Seconds that the prefill saves, and the steps after it."""
    with torch.inference_mode():
        first = time_pairs(lambda: decoder.answer(tokens, 1), lambda: decoder.answer(tokens[:, :budget], 1), repeats)
        whole = time_pairs(lambda: decoder.answer(tokens, 1 + _NEW_TOKENS), lambda: decoder.answer(tokens[:, :budget], 1 + _NEW_TOKENS), repeats)
    prefill = first.median_a - first.median_b
    return prefill, whole.median_a - whole.median_b - prefill


def _reducer(name: str, tokens: Tensor, saved: dict[int, tuple[float, float]], repeats: int) -> Iterator[Measure]:
    reducer = build_reducer(REDUCERS[name])
    gains = {}
    for budget in saved:
        if budget not in reducer.supported_budgets(tokens.shape[1]):
            continue
        seconds = time_pairs(_call(reducer, tokens, budget), _call(reducer, tokens, budget), repeats).median_a
        prefill, decode = saved[budget]
        gains[budget] = prefill + decode - seconds
        label = f"{name}, {SIDE * SIDE} -> {budget}, batch {len(tokens)}"
        yield Measure(f"{label}: reduction", 1000 * seconds, "ms")
        yield Measure(f"{label}: reduction over prefill saved", 100 * seconds / prefill, "%")
        yield Measure(f"{label}: net gain", 1000 * gains[budget], "ms")
    paying = [budget for budget, gain in gains.items() if gain > 0]
    if paying:
        yield Measure(f"{name}, batch {len(tokens)}: break-even budget", max(paying), "tokens", against="of the budgets that were measured")


def _call(reducer: TokenReducer, tokens: Tensor, budget: int) -> Callable[[], object]:
    return lambda: reducer(tokens, num_visual_tokens=budget)


def _decoder() -> _Decoder:
    processor = ElasticPaliGemmaProcessor.from_pretrained(resolve_checkpoint(MINI_BASE).path)
    config = build_config(_DECODER, processor)
    model = build_model(config, 0).eval()
    use_sdpa_where_exact(model)
    return _Decoder(model, config.text_config.hidden_size, kv_cache_bytes(from_transformers_config(config), 1, bytes_per_value=4))
