"""Counts the tokens of an evaluation's samples and predicts its memory, before anything starts."""

import math

import torch

from parcelray.config.evaluate import BLIND, EvaluateJob
from parcelray.config.identity import identity
from parcelray.evaluation.memory import run_answers
from parcelray.evaluation.plan import budgets_for, prepare
from parcelray.models.vlm import ElasticConfig, config_of, empty_vlm, load_processor, use_sdpa_where_exact
from parcelray.profiling.gpus import gpu_of
from parcelray.profiling.simulated_memory import HEAP_OVERHEAD, MemoryEstimate, MemoryMeter
from parcelray.profiling.token_plan import (
    RowTokens,
    TokenPlan,
    budget_memory,
    data_tokens,
    machine_limit,
    row_tokens,
    shown_budgets,
)
from parcelray.tracking.registry import resolve_model


def evaluation_token_plan(
    job: EvaluateJob, *, num_rows: int = 1000, memory_gib: float | None = None, gpu: str | None = None
) -> TokenPlan:
    """Plans the tokens and the memory of an evaluation.

    Args:
        job: the evaluation.
        num_rows: number of rows to read of each benchmark, evenly spread; 0: all.
        memory_gib: memory of one actor, GiB; None: that of `gpu`, or this machine's divided by the actors.
        gpu: name of a type of GPU, see `profiling.gpus`.

    Raises:
        UserError: the job cannot start as it is.
    """
    checkpoint = resolve_model(job.model, job.tracking.uri)
    config, processor = config_of(checkpoint.path), load_processor(checkpoint.path)
    budgets = budgets_for(job, checkpoint)
    positions = int(config.text_config.max_position_embeddings)
    rows: list[RowTokens] = []
    data = []
    for benchmark in prepare(job, processor.image_size):
        count = min(len(benchmark.rows), num_rows or len(benchmark.rows))
        chosen = [benchmark.rows[index * len(benchmark.rows) // count] for index in range(count)]
        own = [
            row_tokens(processor, sample, benchmark.generation.max_new_tokens)
            for row in chosen
            for sample in benchmark.reader.read(row).samples
        ]
        if own:
            in_all = None if count < len(benchmark.rows) else len(own)
            data.append(data_tokens(benchmark.config.name, own, in_all, budgets, positions))
            rows += own
    actors = max(1, job.compute.actors)
    if memory_gib is not None:
        limit = round(memory_gib * 2**30)
    else:
        limit = gpu_of(gpu).memory_gib * 2**30 if gpu is not None else machine_limit(actors)
    num_images = max((row.num_images for row in rows), default=1)
    text = max((row.at(1).text for row in rows), default=1)
    memory = []
    for budget in shown_budgets([each for each in budgets if each != BLIND]):
        sizes = (job.compute.batch_size, 2 * job.compute.batch_size)
        low, high = (_memory(job, config, size, num_images, budget, text) for size in sizes)
        per_image = (high.total - low.total) / sizes[0]
        fits = math.floor(sizes[0] + (limit - low.total) / per_image) if per_image > 0 else sizes[0]
        memory.append(budget_memory(budget, low, max(0, fits)))
    fitting = [each.budget for each in memory if each.weights_bytes + each.above_bytes <= limit]
    return TokenPlan(
        identity(job),
        tuple(data),
        tuple(memory),
        f"{job.compute.batch_size} images per batch on {actors} actors, with a feature cache of"
        f" {job.compute.feature_cache_gb:g} GiB",
        "images per batch",
        limit,
        max(fitting, default=None),
        ("Evaluation cuts no prompt.",),
    )


def _memory(
    job: EvaluateJob, config: ElasticConfig, batch_size: int, num_images: int, budget: int, text: int
) -> MemoryEstimate:
    dtype = getattr(torch, job.dtype)
    meter = MemoryMeter()
    with meter.simulated():
        model = empty_vlm(config, dtype).eval()
        use_sdpa_where_exact(model)
        weights = meter.live_bytes
        run_answers(
            model,
            num_images_per_batch=batch_size,
            num_images=num_images,
            # A reducer gets all patch tokens.
            num_visual_tokens=budget if job.reducer is None else max(model.supported_budgets),
            num_text_tokens=text,
            image_size=config.vision_config.image_size,
        )
    above = meter.peak_bytes - weights
    if not job.compute.gpus_per_actor:
        above = round(HEAP_OVERHEAD * above)
    return MemoryEstimate(weights, above + round(job.compute.feature_cache_gb * 2**30))
