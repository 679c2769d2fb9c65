"""Counts the tokens of a training's rows and predicts its memory, before anything starts."""

import math
from collections.abc import Sequence
from dataclasses import replace

from parcelray.benchmarks.training_data import check_rows, training_source
from parcelray.config.identity import identity
from parcelray.config.train import TrainJob
from parcelray.datasets.source import SampleSource
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.vlm import ElasticConfig
from parcelray.profiling.gpus import gpu_of
from parcelray.profiling.simulated_memory import MemoryEstimate
from parcelray.profiling.token_plan import (
    RowTokens,
    TokenPlan,
    budget_memory,
    data_tokens,
    machine_limit,
    row_tokens,
    shown_budgets,
)
from parcelray.training.memory import StepLoad, largest_batch, training_memory
from parcelray.training.planned_model import planned_model
from parcelray.training.start import step_reader


def training_token_plan(
    job: TrainJob, *, num_rows: int = 1000, memory_gib: float | None = None, gpu: str | None = None
) -> TokenPlan:
    """Plans the tokens and the memory of a training.

    Args:
        job: the training.
        num_rows: number of rows to read, evenly spread; 0: all rows of finite data.
        memory_gib: memory of one worker, GiB; None: that of `gpu`, or this machine's divided by the workers.
        gpu: name of a type of GPU, see `profiling.gpus`.

    Raises:
        UserError: the job cannot start as it is.
    """
    check_rows(job.data)
    model, processor, _, note = planned_model(job)
    config: ElasticConfig = model.config
    source = training_source(job.data, processor.image_size)
    workers = max(1, job.scaling.bounds[0])
    step_reader(job, processor, 0, workers)  # checks the size of a step
    rows = _rows(source, processor, num_rows)
    sizes = [group.size for group in source.groups]
    budgets = shown_budgets(job.budget.values())
    positions = int(config.text_config.max_position_embeddings)
    finite = [size for size in sizes if size is not None]
    data = data_tokens(job.data.type, rows, sum(finite) if len(finite) == len(sizes) else None, budgets, positions)
    if memory_gib is not None:
        limit = round(memory_gib * 2**30)
    elif gpu is not None:
        limit = gpu_of(gpu).memory_gib * 2**30
    else:
        limit = machine_limit(workers)
    memory = []
    parts = job.training.gradient_accumulation_steps
    for budget in budgets:
        load = largest_load(job, rows, budget)
        most = largest_batch(job, config, load, processor.visual_offset, limit)
        predicted = training_memory(job, config, load, processor.visual_offset)
        memory.append(budget_memory(budget, predicted, most * max(1, load.num_images) * parts * workers))
    fitting = [each.budget for each in memory if each.weights_bytes + each.above_bytes <= limit]
    return TokenPlan(
        identity(job),
        (data,),
        tuple(memory),
        f"images per step: {job.training.images_per_step}, workers: {workers}, micro-batches: {parts}",
        "images per step",
        limit,
        max(fitting, default=None),
        (*_notes(job), *((note,) if note is not None else ())),
    )


def dry_run_memory(job: TrainJob, config: ElasticConfig, processor: ElasticProcessor) -> MemoryEstimate:
    """Predicts the peak memory of a worker at the largest budget, from the lengths of the first rows."""
    rows = _rows(training_source(job.data, processor.image_size), processor, 64)
    return training_memory(job, config, largest_load(job, rows, job.budget.values()[-1]), processor.visual_offset)


def largest_load(job: TrainJob, rows: Sequence[RowTokens], budget: int) -> StepLoad:
    """Returns the largest micro-batch of a worker: of the rows whose images and texts are the most together."""
    loads = []
    for num_images in {row.num_images for row in rows}:
        same = [row for row in rows if row.num_images == num_images]
        samples = job.training.images_per_step // max(1, num_images)
        share = math.ceil(samples / max(1, job.scaling.bounds[0]))
        loads.append(
            StepLoad(
                math.ceil(share / job.training.gradient_accumulation_steps),
                num_images,
                max(row.at(budget).text for row in same),
                max(row.num_answer_tokens for row in same),
                budget,
                max(row.num_sequences for row in same),
            )
        )
    # The passes grow faster than linearly with the length of a prompt.
    return max(
        loads,
        key=lambda load: (
            load.num_samples * load.num_sequences * (load.num_images * budget + load.num_text_tokens) ** 1.5
        ),
    )


def _rows(source: SampleSource, processor: ElasticProcessor, num_rows: int) -> list[RowTokens]:
    """Counts the tokens of rows of every group: evenly spread, or the first ones of an endless group."""
    rows = []
    for group in source.groups:
        wanted = max(1, round(num_rows * group.weight))
        if group.size is None:
            indices: Sequence[int] = range(wanted or 1)
        else:
            count = min(group.size, wanted) if num_rows else group.size
            indices = [index * group.size // count for index in range(count)]
        for index in indices:
            row = row_tokens(processor, source.get(group.name, index))
            rows.append(replace(row, id=f"{group.name}/{row.id}"))
    return rows


def _notes(job: TrainJob) -> tuple[str, ...]:
    notes = ["Training cuts no row: every batch is padded to its longest row."]
    if job.training.strategy == "fsdp" and job.scaling.gpus_per_worker:
        notes.append("Weights, gradients and optimizer state are those of a worker that is not sharded.")
    return tuple(notes)
