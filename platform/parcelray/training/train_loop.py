"""The training loop of one rank, over accelerate: the same code in this process and in a Ray Train worker.

`fit_in_process` runs it in this process, without Ray: on machines that have only torch and transformers, for debugging,
and as the baseline of `parcelray bench train`. `ray_worker.train_worker` runs it on each worker of Ray Train.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from parcelray.analysis.redundancy import effective_rank, image_dependent_share, mean_pairwise_cosine
from parcelray.config.identity import config_hash
from parcelray.config.train import TrainJob
from parcelray.datasets.collator import Batch
from parcelray.datasets.sample import Sample
from parcelray.errors import SystemFailure
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.evaluation.scoring.split_scores import score
from parcelray.models.adapters import frozen_digest
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.training_attention import training_kernels
from parcelray.models.vlm import empty_vlm, use_sdpa_where_exact
from parcelray.tracking.metric_logger import MetricLogger, NoMetrics
from parcelray.tracking.run_folder import CHECKPOINT
from parcelray.training import checkpointing
from parcelray.training.accelerator import make_accelerator
from parcelray.training.batches.schedule import StepReader, in_process_batches
from parcelray.training.batches.skipped import SkippedRows
from parcelray.training.budget_sampling import BudgetSampler
from parcelray.training.start import (
    build_resumed,
    build_start,
    build_trained,
    check_device,
    compile_layers,
    prepare_model,
    set_allocator,
    step_reader,
    validation_samples,
)
from parcelray.training.step import TensorBatch, build_optimizer, learning_rate_factor, losses, to_tensors
from parcelray.training.token_clock import TokenClock

logger = logging.getLogger(__name__)

_DIAGNOSED_IMAGES = 8
"""Largest number of images whose tokens the diagnostics measure."""
_LOW_IMAGE_SHARE = 0.5
"""A training warns when the image-dependent share of the variance of queries is below this multiple of the patches'."""


class Reporter(Protocol):
    """Receives the checkpoints of a rank; every rank calls it at the same steps (Ray Train's report is a barrier)."""

    def __call__(self, metrics: dict[str, float], checkpoint: Path | None, validate: bool, /) -> None:
        """Store the checkpoint with its metrics.

        Args:
            metrics: newest value of each metric, and `step`.
            checkpoint: the folder to copy; None on ranks that have no part of the checkpoint.
            validate: whether to score the checkpoint in the background.
        """
        ...


@dataclass(frozen=True)
class LoopInputs:
    """Inputs of the loop in addition to the job: the start, the source of batches, and the outputs."""

    checkpoint: Path | None
    """Folder that `job.model` was resolved to; None for a model from scratch, or if a resumed training needs none."""
    resume_from: Path | None
    """Training checkpoint to resume from; None to start at step 0."""
    batches: Callable[[StepReader, int, int], Iterable[Batch]]
    """Called with (reader, first step, number of steps of the run); yields this rank's share of each step."""
    report: Reporter
    logger: MetricLogger = field(default_factory=NoMetrics)
    on_progress: Callable[[int, str], None] = lambda step, state: None
    """Called with the number of finished steps and a short text at every metric point."""
    on_notice: Callable[[str], None] = lambda line: None
    """Called with a sentence on what the user should know, such as the step after which the training resumes."""
    cpu_only: bool = True


def fit_in_process(
    job: TrainJob,
    folder: Path,
    *,
    checkpoint: Path | None,
    logger: MetricLogger,
    on_progress: Callable[[int, str], None] = lambda step, state: None,
    on_notice: Callable[[str], None] = lambda line: None,
    on_report: Callable[[Mapping[str, float]], None] | None = None,
    on_kept: Callable[[Path], None] | None = None,
) -> tuple[Path, dict[str, float]]:
    """Train a job to its end in this process, resuming from the newest checkpoint in `folder`.

    Args:
        job: the training.
        folder: folder of the checkpoints.
        checkpoint: folder that `job.model` was resolved to; None for a model from scratch.
        logger: receives the metrics.
        on_progress: called with the number of finished steps and a short text at every metric point.
        on_notice: called with a sentence on what the user should know.
        on_report: called with the metrics at each checkpoint.
        on_kept: called with each checkpoint folder when it is complete.

    Returns:
        The newest checkpoint folder and the last metrics.
    """
    set_allocator(job)

    def report(metrics: dict[str, float], source: Path | None, validate: bool) -> None:
        if source is not None:
            target = folder / f"{CHECKPOINT}{int(metrics['step']):08d}"
            checkpointing.keep(source, target, job.checkpointing.keep)
            if on_kept is not None:
                on_kept(target)
        if on_report is not None:
            on_report(metrics)

    metrics = train(
        job,
        LoopInputs(
            checkpoint=checkpoint,
            resume_from=checkpointing.newest(folder),
            batches=in_process_batches,
            report=report,
            logger=logger,
            on_progress=on_progress,
            on_notice=on_notice,
            cpu_only=not torch.cuda.is_available(),
        ),
    )
    newest = checkpointing.newest(folder)
    assert newest is not None, "the last step reports a checkpoint"
    return newest, metrics


def train(job: TrainJob, inputs: LoopInputs) -> dict[str, float]:
    """Run the job's steps on this rank.

    Returns:
        The last step's metrics with the validation scores.

    Raises:
        SystemFailure: the loss is not finite.
    """
    if inputs.cpu_only and job.training.kernels is None:
        torch.set_flush_denormal(True)  # see docs/training.md, Speed on CPUs
    try:
        return _Loop(job, inputs).run()
    finally:
        torch.set_flush_denormal(False)
        # accelerate keeps its state in the process, but the next training in it may use another precision.
        AcceleratorState._reset_state(reset_partial_state=True)


def repeatable_step(job: TrainJob, checkpoint: Path | None, num_visual_tokens: int) -> Callable[[], float]:
    """Build the repeatable optimiser step of a job on its first batch, for measurements; a call returns the loss.

    Args:
        job: the training.
        checkpoint: folder that `job.model` was resolved to; None for a model from scratch.
        num_visual_tokens: the budget.
    """
    inputs = LoopInputs(checkpoint, None, in_process_batches, lambda metrics, folder, validate: None)
    AcceleratorState._reset_state(reset_partial_state=True)
    loop = _Loop(job, inputs)
    batch = to_tensors(step_reader(job, loop.processor, 0, 1).read(0), loop.accelerator.device, loop.processor)
    return lambda: loop._step(0, batch, (num_visual_tokens,))[0]


class _Loop:
    def __init__(self, job: TrainJob, inputs: LoopInputs) -> None:
        self.job = job
        self.inputs = inputs
        check_device(job, cpu_only=inputs.cpu_only)
        if inputs.resume_from is None:
            vlm, self.processor = build_start(job, inputs.checkpoint)
            prepare_model(vlm, job)
        else:
            vlm, self.processor = build_resumed(job, inputs.resume_from, inputs.checkpoint)
        self.vlm: ElasticVLM = vlm
        # Before the weights are sharded.
        self.frozen = frozen_digest(vlm) if job.training.lora is not None else None
        self.validation = validation_samples(job, self.processor)
        if job.training.compile:
            compile_layers(vlm)
        set_seed(job.seed)
        self.accelerator = make_accelerator(job.training, vlm.layer_classes, cpu_only=inputs.cpu_only)
        # In fp32, torch's fused attention is faster.
        self.own_kernels = (
            job.training.kernels is None
            and job.training.attention is None
            and self.accelerator.device.type == "cpu"
            and self.accelerator.mixed_precision == "bf16"
        )
        self.sampler = BudgetSampler(job.budget, job.seed, vlm.connector, with_largest=job.distillation is not None)
        optimizer = build_optimizer(vlm, job.optimizer)
        # Before a restore, which sets the scheduled rates of the restored step.
        self.peak_rates = [float(group["lr"]) for group in optimizer.param_groups]
        # `self.model` is what the ranks train: `self.vlm`, wrapped by accelerate for DDP or FSDP.
        self.model, self.optimizer = self.accelerator.prepare(vlm.train(), optimizer)
        self._low_shares = 0
        self.first_step = 0
        self.last_metrics: dict[str, float] = {}
        self.skipped = SkippedRows()
        if inputs.resume_from is not None:
            state = checkpointing.read_state(inputs.resume_from)
            self.first_step, self.last_metrics = state.step, state.metrics
            self.inputs.logger.restore(state.unsent_metrics)
            self.skipped = SkippedRows(state.skipped_rows)
            checkpointing.restore(
                inputs.resume_from, accelerator=self.accelerator, model=self.model, optimizer=self.optimizer
            )
            inputs.on_notice(f"The training resumes after step {state.step} of {job.training.steps}.")

    def run(self) -> dict[str, float]:
        """Run all remaining steps, with metrics, validations and checkpoints at their intervals."""
        training, rank, world = self.job.training, self.accelerator.process_index, self.accelerator.num_processes
        reader = step_reader(self.job, self.processor, rank, world)
        batches = self.skipped.watched(self.inputs.batches(reader, self.first_step, training.steps), reader.max_skipped)
        clock = TokenClock()
        for step in range(self.first_step, training.steps):
            batch = to_tensors(next(batches), self.accelerator.device, self.processor)
            budgets = self.sampler.budgets(step)
            loss, norm, divergence = self._step(step, batch, budgets)
            clock.add(sum(batch.tokens(budget).total for budget in budgets) * world)
            done = step + 1
            _check_finite(loss, norm, done, training.precision)
            if self._due(done, training.log_every_steps):
                metrics = {
                    "train/loss": loss,
                    "train/grad_norm": norm,
                    "train/learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                    "train/budget": float(budgets[-1]),
                    "train/tokens_per_second": clock.rate(),
                }
                if self.job.distillation is not None and len(budgets) > 1:
                    metrics["train/distillation"] = divergence
                metrics |= self._diagnostics(
                    batch, budgets[-1], self.sampler.anchor_grid(step, len(budgets) - 1, budgets[-1])
                )
                metrics |= self.skipped.metrics()
                self._log(metrics, done)
                self.last_metrics |= metrics
                speed = metrics["train/tokens_per_second"]
                self.inputs.on_progress(done, f"loss {loss:.3f}, {budgets[-1]} visual tokens, {speed:,.0f} tokens/s")
            validate = self._due(done, self.job.validation.every_steps)
            in_background = self.job.validation.in_background
            if validate and not in_background:
                scores = self._validate()
                self._log(scores, done)
                self.last_metrics |= scores
            if self._due(done, self.job.checkpointing.every_steps) or (validate and in_background):
                self._checkpoint(done, validate=validate and in_background)
            clock.restart_if(self._due(done, training.log_every_steps))
        self.inputs.logger.close()
        return self.last_metrics

    def _due(self, done: int, every: int) -> bool:
        return done == self.job.training.steps or (every > 0 and done % every == 0)

    def _step(self, step: int, batch: TensorBatch, budgets: tuple[int, ...]) -> tuple[float, float, float]:
        """Do one optimiser step.

        Returns:
            The mean answer loss over prompts and budgets of all ranks, the gradient norm, and the mean KL divergence
            of the budgets below the teacher's from it (0 without one).
        """
        training, accelerator = self.job.training, self.accelerator
        factor = learning_rate_factor(step, training.steps, self.job.schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        counts = torch.tensor([float(batch.num_prompts), float(batch.num_answer_tokens)], device=accelerator.device)
        prompts, answer_tokens = accelerator.reduce(counts, reduction="sum")
        token_weight = prompts / answer_tokens if training.loss_mean == "tokens" else None
        grids = [self.sampler.anchor_grid(step, index, budget) for index, budget in enumerate(budgets)]
        passes = [
            (self._labelled(micro_batch, budget, grid), budget, grid)
            for micro_batch in batch.micro_batches(
                training.gradient_accumulation_steps, by_tokens=training.group_by_tokens
            )
            for budget, grid in zip(budgets, grids, strict=True)
        ]
        total, divergence = torch.zeros((2,), device=accelerator.device)
        weight = self.job.distillation.weight if self.job.distillation is not None else 0.0
        teacher_logits_AV: torch.Tensor | None = None
        for index, (micro_batch, budget, grid) in enumerate(passes):
            is_teacher = weight > 0 and index % len(budgets) == 0
            unsynced = accelerator.no_sync(self.model) if index < len(passes) - 1 else nullcontext()
            # Also around the backward pass, which computes layers again with activation checkpointing.
            kernels = training_kernels(self.vlm) if self.own_kernels else nullcontext()
            with accelerator.autocast(), unsynced, kernels:
                parts_of_loss = losses(
                    self.model,
                    micro_batch,
                    num_visual_tokens=budget,
                    image_token_id=self.vlm.config.image_token_id,
                    anchor_grid=grid,
                    teacher_logits_AV=None if is_teacher else teacher_logits_AV,
                    keep_logits=is_teacher,
                    token_weight=token_weight,
                )
                # Distributed training averages the ranks' gradients. The gradient needed here is the sum over all
                # prompts, divided by their number.
                scale = accelerator.num_processes / (prompts * len(budgets))
                total += scale * parts_of_loss.answer_sum.detach()
                if parts_of_loss.distillation_sum is not None:
                    divergence += scale * parts_of_loss.distillation_sum.detach() * len(budgets) / (len(budgets) - 1)
                if is_teacher:
                    teacher_logits_AV = parts_of_loss.answer_logits_AV
                accelerator.backward(scale * parts_of_loss.objective(training.patch_supervision, weight))
        norm = accelerator.clip_grad_norm_(self.model.parameters(), training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        total, divergence = accelerator.reduce(torch.stack([total, divergence]), reduction="mean").tolist()
        return total, float(norm), divergence

    def _labelled(self, batch: TensorBatch, budget: int, anchor_grid: int | None) -> TensorBatch:
        """Drop patch labels if the visual tokens are not the patches in raster order, as those of queries are not."""
        places = self.vlm.connector.token_places(budget, anchor_grid)
        are_patches = list(places) == list(range(self.vlm.config.grid_size**2))
        return batch if are_patches else replace(batch, patch_labels_BN=None)

    @torch.no_grad()
    def _diagnostics(self, batch: TensorBatch, budget: int, anchor_grid: int | None) -> dict[str, float]:
        """Rank, cosine and image share of anchors and queries on up to 8 images: queries can collapse alone.

        The images are spread over the batch, because neighbours can be frames of one video.
        """
        if checkpointing.is_sharded(self.accelerator) or not len(batch.pixel_values_ICHW):
            return {}  # sharded weights cannot run outside the wrapped forward
        model = self.vlm
        pixels_ICHW = batch.pixel_values_ICHW[:: math.ceil(batch.pixel_values_ICHW.shape[0] / _DIAGNOSED_IMAGES)]
        split = {} if anchor_grid is None else {"anchor_grid": anchor_grid}
        patches_IND = model.model.encode_patches(pixels_ICHW)
        tokens_IKD = model.connector(patches_IND, num_visual_tokens=budget, **split).float()
        count = model.connector.num_anchors(budget) if anchor_grid is None else anchor_grid**2
        metrics = {}
        for name, part_IKD in (("anchors", tokens_IKD[:, :count]), ("queries", tokens_IKD[:, count:])):
            # Weights that have just overflowed are reported at the next step's loss; here they would fail in LAPACK.
            if part_IKD.shape[1] > 1 and bool(part_IKD.isfinite().all()):
                metrics[f"tokens/{name}_effective_rank"] = float(effective_rank(part_IKD).mean())
                metrics[f"tokens/{name}_mean_cosine"] = float(mean_pairwise_cosine(part_IKD).mean())
                share = float(image_dependent_share(part_IKD))
                if math.isfinite(share):  # of two or more images
                    metrics[f"tokens/{name}_image_share"] = share
        if "tokens/queries_image_share" in metrics:
            self._warn_of_constant_queries(metrics["tokens/queries_image_share"], patches_IND)
        return metrics

    def _warn_of_constant_queries(self, image_share: float, patches_IND: torch.Tensor) -> None:
        # Where images are alike, as in easy-VQA, even patches have a low share. A single batch says little.
        of_patches = float(image_dependent_share(patches_IND))
        self._low_shares = self._low_shares + 1 if image_share < _LOW_IMAGE_SHARE * of_patches else 0
        if self._low_shares == 2 and self.accelerator.is_main_process:
            logger.warning(
                "Only %.0f %% of the variance of the query tokens depends on the image (of the patches %.0f %%), so the"
                " language model learns to ignore them; check that connector.start is local.",
                100 * image_share,
                100 * of_patches,
            )

    def _validate(self) -> dict[str, float]:
        """Scores per budget over the validation samples; each rank scores its share, or rank 0 all of them."""
        accelerator, samples = self.accelerator, self.validation
        if not samples:
            return {}
        device = str(accelerator.device)
        if checkpointing.is_sharded(self.accelerator):
            values = self._validate_copy(device)
        else:
            mine = samples[accelerator.process_index :: accelerator.num_processes]
            self.vlm.eval()
            values = _validation_values(self.job, self.vlm, self.processor, mine, device)
            self.vlm.train()
        metrics = {}
        for budget in _validation_budgets(self.job, self.vlm):
            scores = values.get(budget, [])
            sums = torch.tensor([float(sum(scores)), float(len(scores))], device=accelerator.device)
            sums = accelerator.reduce(sums, reduction="sum")
            metrics[_validation_metric(budget)] = float(sums[0] / sums[1])
        return metrics

    def _validate_copy(self, device: str) -> dict[int, list[float]]:
        """Score a copy of the gathered weights on rank 0, because answers need passes outside the wrapped forward."""
        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self.accelerator.is_main_process:
            return {}
        copy: Any = empty_vlm(self.vlm.config)
        use_sdpa_where_exact(copy)
        prepare_model(copy, self.job)
        copy.load_state_dict(weights, assign=True)
        copy.tie_weights()
        return _validation_values(self.job, copy.eval().to(device), self.processor, self.validation, device)

    def _checkpoint(self, done: int, *, validate: bool = False) -> None:
        accelerator = self.accelerator
        state = checkpointing.TrainState(
            done,
            config_hash(self.job),
            self.sampler.state(),
            accelerator.num_processes,
            self.last_metrics,
            self.inputs.logger.flush(),
            skipped_rows=self.skipped.gathered(),
            frozen=self.frozen,
        )
        with tempfile.TemporaryDirectory(prefix="parcelray-checkpoint-") as name:
            checkpointing.save(
                Path(name),
                accelerator=accelerator,
                model=self.model,
                optimizer=self.optimizer,
                processor=self.processor,
                state=state,
            )
            has_part = accelerator.is_main_process or checkpointing.is_sharded(accelerator)
            # Every rank must report: the report is a barrier.
            metrics = {**self.last_metrics, "step": float(done)}
            self.inputs.report(metrics, Path(name) if has_part else None, validate)

    def _log(self, metrics: dict[str, float], done: int) -> None:
        if self.accelerator.is_main_process:
            self.inputs.logger.log_metrics(metrics, done)


def validate_checkpoint(job: TrainJob, folder: Path, start: Path | None) -> tuple[int, dict[str, float]]:
    """Score the model of a training checkpoint on the validation samples.

    Args:
        job: the training.
        folder: the checkpoint folder.
        start: see `build_resumed`.

    Returns:
        The step of the checkpoint, and the score at each budget by metric name.
    """
    device = "cuda" if job.validation.background_gpus and torch.cuda.is_available() else "cpu"
    model, processor = build_trained(job, folder, start)
    samples = validation_samples(job, processor)
    values = _validation_values(job, model.eval().to(device), processor, samples, device)
    metrics = {_validation_metric(budget): sum(scores) / len(scores) for budget, scores in values.items()}
    return checkpointing.read_state(folder).step, metrics


def _validation_budgets(job: TrainJob, model: ElasticVLM) -> list[int]:
    return [budget for budget in job.validation.budgets if budget in model.supported_budgets]


def _validation_metric(num_visual_tokens: int) -> str:
    return f"val/score@{num_visual_tokens}"


def _validation_values(
    job: TrainJob, model: ElasticVLM, processor: ElasticProcessor, samples: Sequence[Sample], device: str
) -> dict[int, list[float]]:
    """Score of each sample at each validation budget that the model supports; the model must be in evaluation mode."""
    budgets = _validation_budgets(job, model)
    predictions = Predictor(model, processor, device=device).generate_budgets(samples, budgets)
    return {budget: score(samples, predictions[budget]) for budget in budgets}


def _check_finite(loss: float, norm: float, step: int, precision: str) -> None:
    """Fail on a loss or gradient norm that is not finite, so that no checkpoint (and no restart) has such weights."""
    # Under fp16 the loss scaler skips steps whose gradients overflow.
    if not math.isfinite(loss) or (not math.isfinite(norm) and precision != "fp16"):
        raise SystemFailure(
            f"The loss at step {step} is {loss} and the gradient norm {norm}; both must be finite. Lower"
            " optimizer.learning_rate or training.clip_norm, or set training.precision to bf16 or fp32."
        )
