"""Predicts the peak memory of a training worker by simulating its largest step."""

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from parcelray.config.optimizer import AdamW8bitConfig, AdamWConfig
from parcelray.config.train import TrainJob
from parcelray.evaluation.memory import run_answers
from parcelray.models.backbones import ElasticVLM
from parcelray.models.vlm import ElasticConfig, empty_vlm, use_sdpa_where_exact
from parcelray.profiling.simulated_memory import HEAP_OVERHEAD, MemoryEstimate, MemoryMeter
from parcelray.training.start import prepare_model, saves_memory
from parcelray.training.step import TensorBatch, build_optimizer, losses

_VALIDATION_IMAGES = 64
"""Images per batch of a validation, the default of `Predictor`."""
_FIRST_STEP_BYTES = 19 << 20
"""What a process that returns freed memory holds above its live tensors, mostly code that the first step loads.

10 to 29 MiB, measured for a mini PaliGemma and a mini LLaVA with adapters, activation checkpointing, and both.
"""


@dataclass(frozen=True)
class StepLoad:
    """The largest micro-batch of a worker."""

    num_samples: int
    num_images: int
    """Images per sample."""
    num_text_tokens: int
    """Tokens of the longest prompt and its answer together, to which the others are padded."""
    num_answer_tokens: int
    """Tokens of the longest answer."""
    num_visual_tokens: int
    """Budget: the largest of the step, because the passes of a step follow one another."""
    num_sequences: int = 1
    """Prompts per sample, which share its images."""


def training_memory(
    job: TrainJob, config: ElasticConfig, load: StepLoad, visual_offset: int, *, validate: bool = True
) -> MemoryEstimate:
    """Predicts the peak memory of a worker that is not sharded.

    It is the peak of a training step, with gradients and optimizer state, or of a validation batch if that is larger.

    Args:
        job: the training.
        config: configuration of the model that is trained.
        load: the largest micro-batch.
        visual_offset: number of text tokens before the image placeholders.
        validate: whether the worker also validates.
    """
    meter = MemoryMeter()
    with meter.simulated():
        model = empty_vlm(config)
        use_sdpa_where_exact(model)
        # PEFT makes its layers on the meta device, which fails inside a simulation.
        with unset_fake_temporarily():
            prepare_model(model, job)
        if job.training.attention in ("flash", "flex"):
            # These kernels cannot be simulated; they keep the same tensors as the fused SDPA.
            model.model.language_model.config._attn_implementation = "sdpa"
        weights = meter.live_bytes
        optimizer, moments = _optimizer(job, model.train())
        _set_gradients(model)
        optimizer.step()
        if job.training.gradient_accumulation_steps == 1:
            optimizer.zero_grad(set_to_none=True)
        run_step(job, model, load, visual_offset)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if validate and not job.validation.in_background:
            run_answers(
                model.eval(),
                num_images_per_batch=_VALIDATION_IMAGES,
                num_images=load.num_images,
                num_visual_tokens=load.num_visual_tokens,
                num_text_tokens=load.num_text_tokens,
                image_size=config.vision_config.image_size,
            )
        del moments
    above = meter.peak_bytes - weights
    if not job.scaling.gpus_per_worker:
        above = above + _FIRST_STEP_BYTES if saves_memory(job) else round(HEAP_OVERHEAD * above)
    return MemoryEstimate(weights, above)


def _optimizer(job: TrainJob, model: ElasticVLM) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """Returns the optimizer, and tensors of the size of the moments that a step of it does not create."""
    if not isinstance(job.optimizer, AdamW8bitConfig):
        # A fused step has the same state, but its kernel cannot be simulated.
        plain = {"fused": False} if isinstance(job.optimizer, AdamWConfig) else {}
        return build_optimizer(model, job.optimizer.model_copy(update=plain)), []
    trained = [each for each in model.parameters() if each.requires_grad]
    return torch.optim.SGD(trained), [torch.empty_like(each, dtype=torch.float16) for each in trained]


def _set_gradients(model: ElasticVLM) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


def run_step(job: TrainJob, model: ElasticVLM, load: StepLoad, visual_offset: int) -> None:
    """Runs one forward and backward pass of the largest micro-batch; of the model only the gradients are left."""
    size = model.config.vision_config.image_size
    owners_B = torch.arange(load.num_samples).repeat_interleave(load.num_sequences)
    shape = (len(owners_B), load.num_text_tokens)
    is_answer_BS = (torch.arange(load.num_text_tokens) >= load.num_text_tokens - load.num_answer_tokens).expand(shape)
    ids_BS = torch.zeros(shape, dtype=torch.int64)
    batch = TensorBatch(
        torch.empty((load.num_samples * load.num_images, 3, size, size)),
        ids_BS,
        is_answer_BS.long(),
        torch.ones_like(ids_BS),
        torch.where(is_answer_BS, 0, -100),
        None,
        visual_offset,
        owners_B,
    )
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[job.training.precision]
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = losses(
            model, batch, num_visual_tokens=load.num_visual_tokens, image_token_id=model.config.image_token_id
        )
        objective = loss.answer_sum / len(owners_B)
        del loss
        torch.autograd.backward(objective)


def largest_batch(job: TrainJob, config: ElasticConfig, load: StepLoad, visual_offset: int, limit_bytes: int) -> int:
    """Returns the largest number of samples per micro-batch whose predicted memory is within a limit; 0: none.

    The memory of a step grows linearly with the number of samples, so two simulations determine it. That of a
    validation does not depend on it.
    """
    sizes = (16, 32)
    low, high = (
        training_memory(job, config, replace(load, num_samples=size), visual_offset, validate=False).total
        for size in sizes
    )
    per_sample = (high - low) / (sizes[1] - sizes[0])
    return max(0, int((limit_bytes - low) / per_sample) + sizes[0])
