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
from parcelray.serving.engine.decoder import PooledDecoder, Prompt
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
    memory = [
        budget_memory(budget, replica_memory(job, config, budget, reducer), requests_in_kv(job, budget))
        for budget in shown_budgets(job.budgets.offered)
    ]
    fitting = [each.budget for each in memory if each.weights_bytes + each.above_bytes <= limit]
    new = TEXT_TOKENS + job.limits.default_max_tokens
    positions = int(config.text_config.max_position_embeddings) - new
    room = min(positions, job.engine.kv_tokens - new)

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
        decoder = PooledDecoder(model, max_tokens=job.engine.kv_tokens)
        pool = meter.live_bytes - weights
        size = config.vision_config.image_size
        features_IND = model.model.encode_patches(
            torch.empty((job.engine.vision_batch, 3, size, size), dtype=model.dtype)
        )
        tokens_IKL = model.model.compress(
            features_IND, num_visual_tokens=budget if reducer is None else max(model.supported_budgets)
        )
        # A reducer that reads the prompt gets all tokens in the decoder, the others reduce them before.
        if reducer is not None and build_reducer(reducer).reads != "prompt":
            tokens_IKL = tokens_IKL[:, :budget]
        length = tokens_IKL.shape[1] + TEXT_TOKENS
        count = min(
            job.engine.max_running,
            math.ceil(job.engine.prefill_tokens / length),
            decoder.pool.total_tokens // (length + job.limits.default_max_tokens),
        )
        decoder.prefill(
            [
                Prompt(
                    (0,) * TEXT_TOKENS, 0, tokens_IKL[0], budget, decoder.pool.reserve(decoder.kv_lengths(length, 0, 0))
                )
                for _ in range(max(1, count))
            ]
        )
    passes = meter.peak_bytes - weights - pool
    if job.model.device == "cpu":
        passes = round(HEAP_OVERHEAD * passes)
    return MemoryEstimate(weights, pool + passes + job.engine.feature_cache_mb * 2**20)
