"""Builds the start of a training: model, processor and data of a job. Needs only torch and transformers."""

import importlib.util
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.training_data import held_out_samples, training_source
from parcelray.config.model import MiniLlavaModelConfig, MiniModelConfig
from parcelray.config.train import TrainJob
from parcelray.datasets.collator import Collator
from parcelray.datasets.mini.suite import MiniSuite
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.models import mini_llava
from parcelray.models.adapters import add_adapters, freeze_parts, frozen_digest
from parcelray.models.allocator import keep_freed_memory, return_freed_memory
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.mini import build_config, build_model, build_processor
from parcelray.models.vlm import (
    config_of,
    empty_vlm,
    load_processor,
    load_vlm,
    use_attention,
    use_sdpa_where_exact,
)
from parcelray.models.vocabulary import add_words
from parcelray.training.batches.schedule import BatchSchedule, StepReader
from parcelray.training.checkpointing import SHARDS, TRAINED, load_shards, read_state

_TOKENIZER_TEXTS = 20_000
"""Number of texts of the mini suite from which the tokenizer of a model from scratch is built."""


def build_start(job: TrainJob, folder: Path | None) -> tuple[ElasticVLM, ElasticProcessor]:
    """Build model and processor at step 0, with float32 weights whatever the data type of the checkpoint.

    Args:
        job: the training.
        folder: folder that `job.model` was resolved to; None for a model from scratch.

    Raises:
        UserError: the checkpoint is unusable.
    """
    processor: ElasticProcessor
    model: ElasticVLM
    if isinstance(job.model, MiniModelConfig | MiniLlavaModelConfig):
        texts = MiniSuite(split="train").texts(_TOKENIZER_TEXTS)
        connector = job.connector.model_dump(mode="json") if job.connector is not None else None
        if isinstance(job.model, MiniLlavaModelConfig):
            model, processor = mini_llava.build(job.model, texts, connector, job.seed)
        else:
            processor = build_processor(job.model, texts)
            config = build_config(job.model, processor)
            config.connector = connector
            model = build_model(config, job.seed)
    else:
        if folder is None:
            raise UserError(
                f"model.reference {job.model.reference} was not resolved to a folder; call resolve_start first."
            )
        processor = load_processor(folder)
        model = load_vlm(folder, connector=job.connector, seed=job.seed)
        if job.new_words:
            add_words(model, processor, job.new_words)
    use_sdpa_where_exact(model)
    return model, processor


def build_resumed(job: TrainJob, folder: Path, start: Path | None) -> tuple[ElasticVLM, ElasticProcessor]:
    """Build model and processor of a training checkpoint, with float32 weights, prepared by `prepare_model`.

    The weights of a sharded checkpoint are not loaded: `checkpointing.restore` does so when the ranks share the model.

    Args:
        job: the training.
        folder: the training checkpoint.
        start: folder that `job.model` was resolved to, which a training with adapters needs; else None.

    Raises:
        UserError: the frozen weights of the start have changed since the checkpoint was written.
    """
    is_sharded = (folder / SHARDS).is_dir()
    if job.training.lora is None:
        source = folder / "model"
        model = empty_vlm(config_of(source)) if is_sharded else load_vlm(source)
        processor = load_processor(source)
        use_sdpa_where_exact(model)
        prepare_model(model, job)
        return model, processor
    model, processor = build_start(job, start)
    prepare_model(model, job)
    if read_state(folder).frozen != frozen_digest(model):
        raise UserError(
            f"The frozen weights of the model that the training started from are not those of the checkpoint {folder}:"
            " its files have changed, or an earlier version of parcelray wrote the checkpoint. Restore the former model"
            " or version to resume, or give the run another name."
        )
    if not is_sharded:
        missing, unexpected = model.load_state_dict(load_file(folder / TRAINED), strict=False)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert not unexpected, unexpected
        assert not trained & set(missing), trained & set(missing)
    return model, processor


def build_trained(job: TrainJob, folder: Path, start: Path | None) -> tuple[ElasticVLM, ElasticProcessor]:
    """Build model and processor of a training checkpoint in one process, with all weights; see `build_resumed`."""
    model, processor = build_resumed(job, folder, start)
    if (folder / SHARDS).is_dir():
        load_shards(folder, model)
    return model, processor


def prepare_model(model: ElasticVLM, job: TrainJob) -> None:
    """Prepare a model for training: frozen parts, new adapters, attention and activation checkpointing.

    Raises:
        UserError: the model has no weights that the job trains, no layers for adapters, or another attention.
    """
    training = job.training
    freeze_parts(model, training.freeze)
    if training.lora is not None:
        add_adapters(model, training.lora, job.seed)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"training.freeze has {', '.join(training.freeze)}, and the connector {model.connector.name} has no weights"
            " of its own, so nothing is trained; remove a part from training.freeze."
        )
    if training.attention is not None:
        use_attention(model, training.attention)
    if training.activation_checkpointing:
        # Not by transformers' own switch: it would also send gradients through a frozen tower.
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def set_allocator(job: TrainJob) -> None:
    """Set this process's allocator for a training on a CPU: for speed, or for memory if the job saves memory."""
    if saves_memory(job):
        return_freed_memory()
    else:
        keep_freed_memory()


def saves_memory(job: TrainJob) -> bool:
    """Whether a job trades time for memory, by adapters or activation checkpointing."""
    return job.training.activation_checkpointing or job.training.lora is not None


def check_device(job: TrainJob, *, cpu_only: bool) -> None:
    """Check that this host has what the job's attention and optimizer need.

    Raises:
        UserError: a GPU or a package is missing.
    """
    packages: dict[str | None, str | None] = {"flash": "flash_attn", "flex": None, "adamw_8bit": "bitsandbytes"}
    for key, value in (("training.attention", job.training.attention), ("optimizer.type", job.optimizer.type)):
        if value not in packages:
            continue
        if cpu_only:
            raise UserError(f"{key} is {value}, which needs a GPU, but this training has none; change {key}.")
        needed = packages[value]
        if needed is not None and importlib.util.find_spec(needed) is None:
            raise UserError(
                f"{key} is {value}, but the package {needed} is not installed on this host; install it, or change"
                f" {key}."
            )


def compile_layers(model: ElasticVLM) -> None:
    """Compile the layers of vision tower and decoder in place, each for any number of tokens."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)


def step_reader(job: TrainJob, processor: ElasticProcessor, rank: int, world_size: int) -> StepReader:
    """Build the reader of one rank's batches.

    Raises:
        UserError: a step has fewer samples than there are workers.
    """
    source = training_source(job.data, processor.image_size)
    schedule = BatchSchedule(
        source,
        num_steps=job.training.steps,
        images_per_step=job.training.images_per_step,
        seed=job.seed,
        by_tokens=job.training.group_by_tokens,
    )
    largest = max(1, *(group.num_images for group in source.groups))
    if job.training.images_per_step // largest < world_size:
        raise UserError(
            f"training.images_per_step is {job.training.images_per_step}, which at {largest} images per sample gives"
            f" fewer samples per step than there are workers ({world_size}); raise it to at least"
            f" {largest * world_size}."
        )
    collator = Collator(
        processor,
        label_patches=job.training.patch_supervision > 0,
        max_text_tokens=job.training.max_text_tokens,
    )
    # Generated rows can all be used.
    max_skipped = getattr(source, "max_skipped", 0)
    return StepReader(source, schedule, collator, rank, world_size, max_skipped=max_skipped)


def validation_samples(job: TrainJob, processor: ElasticProcessor) -> list[Sample]:
    """The samples on which the model is scored during the training.

    Raises:
        UserError: a metric does not exist.
    """
    samples = held_out_samples(job.data, "validation", job.validation.samples, processor.image_size)
    for name in {sample.metric for sample in samples}:
        metric(name)
    return samples
