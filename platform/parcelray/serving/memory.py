"""Predicts the peak memory of a replica by simulating its largest prefill."""

import math

import torch

from parcelray.config.identity import identity
from parcelray.config.reducer import ReducerConfig
from parcelray.config.serve import ServeJob
from parcelray.models.model_reducer import positions_per_image
from parcelray.models.token_reduction import build_reducer
from parcelray.models.vlm import ElasticConfig, config_of, empty_vlm, use_sdpa_where_exact
from parcelray.profiling.gpus import gpu_of
from parcelray.profiling.simulated_memory import HEAP_OVERHEAD, MemoryEstimate, MemoryMeter
from parcelray.profiling.token_plan import TokenPlan, budget_memory, machine_limit, shown_budgets
from parcelray.serving.engine.decoder import PooledDecoder, Prompt, rounding_tokens
from parcelray.serving.engine.kv_pool import BLOCK_TOKENS
from parcelray.serving.plan import TEXT_TOKENS, pin, requests_in_kv


def serving_token_plan(job: ServeJob, *, memory_gib: float | None = None, gpu: str | None = None) -> TokenPlan:
    """Plans the tokens and the memory of a replica of the champion.

    Args:
        job: the endpoint.
        memory_gib: memory of one replica, GiB; None: that of `gpu`, or this machine's divided by the replicas.
        gpu: name of a type of GPU, see `profiling.gpus`.

    Raises:
        UserError: see `pin`.
    """
    pinned = pin(job)
    config = config_of(pinned.champion.path)
    if job.model.connector is not None:
        config.connector = job.model.connector.model_dump(mode="json")
    if memory_gib is not None:
        limit = round(memory_gib * 2**30)
    else:
        limit = gpu_of(gpu).memory_gib * 2**30 if gpu is not None else machine_limit(job.replicas.max)
    num_patches, reducer = int(config.grid_size) ** 2, pinned.reducer
    places = positions_per_image(reducer, num_patches)
    built = build_reducer(reducer) if reducer is not None else None
    memory = [
        budget_memory(budget, replica_memory(job, config, budget, reducer), requests_in_kv(job, budget))
        for budget in shown_budgets(job.budgets.offered)
    ]
    fitting = [each.budget for each in memory if each.weights_bytes + each.above_bytes <= limit]
    new = TEXT_TOKENS + job.limits.default_max_tokens
    positions = int(config.text_config.max_position_embeddings) - new
    room = min(positions, job.engine.kv_tokens - rounding_tokens(built) - new)

    def most(budget: int) -> int:
        return min(job.limits.images, room // budget, positions // (places or budget))

    images = ", ".join(f"{most(budget)} at {budget}" for budget in sorted(job.budgets.offered))
    notes = [
        f"Images of one request that fit with {TEXT_TOKENS} text tokens and {job.limits.default_max_tokens} new"
        f" tokens: {images}; requests with more are refused."
    ]
    if reducer is not None:
        notes.append(f"The memory of the reducer {reducer.type} itself is not predicted.")
    return TokenPlan(
        identity(job),
        (),
        tuple(memory),
        f"{job.engine.kv_tokens:,} tokens of KV cache, prefills of {job.engine.prefill_tokens:,} tokens",
        "concurrent requests",
        limit,
        max(fitting, default=None),
        tuple(notes),
    )


@torch.no_grad()
def replica_memory(
    job: ServeJob, config: ElasticConfig, budget: int, reducer: ReducerConfig | None = None
) -> MemoryEstimate:
    """Predicts the peak memory of a replica with full KV cache and full feature cache at one budget."""
    meter = MemoryMeter()
    with meter.simulated():
        model = empty_vlm(config, getattr(torch, job.model.dtype)).eval()
        use_sdpa_where_exact(model)
        weights = meter.live_bytes
        # A reducer that reads the prompt gets all tokens in the decoder, the others reduce them before.
        reads_prompt = reducer is not None and build_reducer(reducer).reads == "prompt"
        entering = int(config.grid_size) ** 2 if reads_prompt else budget
        length = entering + TEXT_TOKENS
        count = max(1, min(requests_in_kv(job, budget), math.ceil(job.engine.prefill_tokens / length)))
        # The prefill is simulated without the reducer, so each layer holds all tokens that enter the decoder.
        kv_tokens = max(job.engine.kv_tokens, count * math.ceil(length / BLOCK_TOKENS) * BLOCK_TOKENS)
        decoder = PooledDecoder(model, max_tokens=kv_tokens)
        pool = meter.live_bytes - weights
        size = config.vision_config.image_size
        features_IND = model.model.encode_patches(
            torch.empty((job.engine.vision_batch, 3, size, size), dtype=model.dtype)
        )
        tokens_IKL = model.model.compress(
            features_IND, num_visual_tokens=budget if reducer is None else max(model.supported_budgets)
        )
        visual_KL = tokens_IKL[0, :entering]
        blocks = [decoder.pool.reserve(decoder.kv_lengths(TEXT_TOKENS, 1, entering)) for _ in range(count)]
        decoder.prefill([Prompt((0,) * TEXT_TOKENS, 0, visual_KL, entering, own) for own in blocks])
    passes = meter.peak_bytes - weights - pool
    pool = pool * job.engine.kv_tokens // kv_tokens
    if job.model.device == "cpu":
        passes = round(HEAP_OVERHEAD * passes)
    return MemoryEstimate(weights, pool + passes + job.engine.feature_cache_mb * 2**20)
