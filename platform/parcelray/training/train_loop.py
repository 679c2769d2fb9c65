"""The training loop of one rank, over accelerate: the same code in-process and in a Ray Train worker."""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed

from parcelray.analysis.redundancy import effective_rank, mean_pairwise_cosine
from parcelray.config.identity import config_hash
from parcelray.config.train import TrainingConfig, TrainJob
from parcelray.datasets.collator import Batch
from parcelray.datasets.sample import Sample
from parcelray.errors import SystemFailure
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.training import checkpointing
from parcelray.training.budget_sampling import BudgetSampler
from parcelray.training.metric_logger import MetricLogger, NoMetrics
from parcelray.training.progress import Progress
from parcelray.training.step import TensorBatch, build_optimizer, learning_rate_factor, losses, to_tensors
from parcelray.training.validation import validation_metric, validation_values


class Reporter(Protocol):
    """Where a rank reports checkpoints; every rank calls it at the same steps (Ray Train's report is a barrier)."""

    def __call__(self, metrics: dict[str, float], checkpoint: Path | None, validate: bool, /) -> None:
        """`checkpoint` is a folder on rank 0 and None on the others."""
        ...


@dataclass(frozen=True)
class LoopInputs:
    """Everything that the loop reads or calls, besides the job."""

    model: ElasticVLM
    """With the restored weights, when resuming."""
    processor: ElasticProcessor
    batches: Callable[[int, int, int], Iterable[Batch]]
    """(first step, rank, world size) -> this rank's share of the steps from there on."""
    validation: Sequence[Sample] = ()
    resume_from: Path | None = None
    """Checkpoint folder."""
    report: Reporter = lambda metrics, checkpoint, validate: None
    logger: MetricLogger = field(default_factory=NoMetrics)
    on_progress: Callable[[Progress], None] = lambda progress: None
    cpu_only: bool = True


def train(job: TrainJob, inputs: LoopInputs) -> dict[str, float]:
    """Runs the job's steps on this rank.

    Returns:
        The last step's metrics with the validation scores.

    Raises:
        SystemFailure: the loss is not finite.
    """
    try:
        return _Loop(job, inputs).run()
    finally:
        # accelerate keeps its state in the process; the next training there may want another precision.
        AcceleratorState._reset_state(reset_partial_state=True)


class _Loop:
    def __init__(self, job: TrainJob, inputs: LoopInputs) -> None:
        self.job = job
        self.inputs = inputs
        set_seed(job.seed)
        self.accelerator = _accelerator(job.training, inputs.model.layer_classes, cpu_only=inputs.cpu_only)
        if job.training.freeze_vision:
            inputs.model.model.vision_tower.requires_grad_(False)
        self.sampler = BudgetSampler(job.budget, job.seed)
        self.sampler.check(inputs.model.connector)
        optimizer = build_optimizer(inputs.model, job.optimizer)
        # Before a restore, which brings back the scheduled rates of its step.
        self.peak_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.model, self.optimizer = self.accelerator.prepare(inputs.model.train(), optimizer)
        self.first_step = 0
        self.last_metrics: dict[str, float] = {}
        if inputs.resume_from is not None:
            state = checkpointing.read_state(inputs.resume_from)
            self.first_step, self.last_metrics = state.step, state.metrics
            checkpointing.restore_optimizer(
                inputs.resume_from, accelerator=self.accelerator, model=self.model, optimizer=self.optimizer
            )

    def run(self) -> dict[str, float]:
        """All steps from the first; validations, metrics and checkpoints at their intervals."""
        training, rank, world = self.job.training, self.accelerator.process_index, self.accelerator.num_processes
        batches = iter(self.inputs.batches(self.first_step, rank, world))
        clock = _Clock()
        for step in range(self.first_step, training.steps):
            batch = to_tensors(next(batches), self.accelerator.device, self.inputs.processor)
            budgets = self.sampler.budgets(step)
            loss, norm = self._step(step, batch, budgets)
            clock.add(_num_tokens(batch, budgets) * world)
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
                metrics |= self._diagnostics(
                    batch, budgets[-1], self.sampler.anchor_grid(step, len(budgets) - 1, budgets[-1])
                )
                self._log(metrics, done)
                self.last_metrics |= metrics
                self.inputs.on_progress(
                    Progress(
                        done, training.steps, metrics["train/loss"], budgets[-1], metrics["train/tokens_per_second"]
                    )
                )
            validate = self._due(done, self.job.validation.every_steps)
            in_background = self.job.validation.in_background
            if validate and not in_background:
                scores = self._validate()
                self._log(scores, done)
                self.last_metrics |= scores
            if self._due(done, self.job.checkpointing.every_steps) or (validate and in_background):
                self._checkpoint(done, validate=validate and in_background)
            clock.restart_if(self._due(done, training.log_every_steps))
        return self.last_metrics

    def _due(self, done: int, every: int) -> bool:
        return done == self.job.training.steps or (every > 0 and done % every == 0)

    def _step(self, step: int, batch: TensorBatch, budgets: tuple[int, ...]) -> tuple[float, float]:
        """One optimiser step; returns the mean answer loss over prompts and budgets of all ranks, and the gradient norm."""
        training, accelerator = self.job.training, self.accelerator
        factor = learning_rate_factor(step, training.steps, self.job.schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        prompts = accelerator.reduce(torch.tensor(float(batch.num_prompts), device=accelerator.device), reduction="sum")
        parts = min(training.gradient_accumulation_steps, batch.num_prompts)
        grids = [self.sampler.anchor_grid(step, place, budget) for place, budget in enumerate(budgets)]
        passes = [
            (batch.slice(part, parts), budget, grid)
            for part in range(parts)
            for budget, grid in zip(budgets, grids, strict=True)
        ]
        total = torch.zeros((), device=accelerator.device)
        for index, (micro_batch, budget, grid) in enumerate(passes):
            with accelerator.autocast(), _sync_only_last(accelerator, self.model, last=index == len(passes) - 1):
                token_id = self.inputs.model.config.image_token_id
                parts_of_loss = losses(
                    self.model, micro_batch, num_visual_tokens=budget, image_token_id=token_id, anchor_grid=grid
                )
                # Distributed training averages the ranks' gradients; the sum over all prompts is wanted, divided by
                # their count.
                scale = accelerator.num_processes / (prompts * len(budgets))
                total += scale * parts_of_loss.answer_sum.detach()
                loss = parts_of_loss.answer_sum
                if parts_of_loss.patch_sum is not None:
                    loss = loss + training.patch_supervision * parts_of_loss.patch_sum
                accelerator.backward(scale * loss)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(accelerator.reduce(total, reduction="mean")), float(norm)

    @torch.no_grad()
    def _diagnostics(self, batch: TensorBatch, budget: int, anchor_grid: int | None) -> dict[str, float]:
        """Effective rank and mean cosine of anchors and queries on a few images (facts: queries can collapse while anchors do not)."""
        if self.job.training.strategy == "fsdp":
            return {}  # sharded weights cannot run outside the wrapped forward
        model = self.inputs.model
        split = {} if anchor_grid is None else {"anchor_grid": anchor_grid}
        tokens_IKD = model.connector(
            model.model.encode_patches(batch.pixel_values_ICHW[:8]), num_visual_tokens=budget, **split
        ).float()
        count = model.connector.num_anchors(budget) if anchor_grid is None else anchor_grid**2
        metrics = {}
        for name, part_IKD in (("anchors", tokens_IKD[:, :count]), ("queries", tokens_IKD[:, count:])):
            # Weights that have just overflowed end the run at the next step's loss, with a sentence; here they would
            # end it in LAPACK.
            if part_IKD.shape[1] > 1 and bool(part_IKD.isfinite().all()):
                metrics[f"tokens/{name}_effective_rank"] = float(effective_rank(part_IKD).mean())
                metrics[f"tokens/{name}_mean_cosine"] = float(mean_pairwise_cosine(part_IKD).mean())
        return metrics

    def _validate(self) -> dict[str, float]:
        """Scores per budget over the validation samples, each rank doing its share."""
        accelerator, samples = self.accelerator, self.inputs.validation
        if not samples:
            return {}
        # Sharded weights need every rank in every forward, so there each rank does all.
        shared = self.job.training.strategy == "ddp"
        mine = samples[accelerator.process_index :: accelerator.num_processes] if shared else samples
        self.inputs.model.eval()
        values = validation_values(self.job, self.inputs.model, self.inputs.processor, mine, str(accelerator.device))
        self.inputs.model.train()
        metrics = {}
        for budget, scores in values.items():
            sums = torch.tensor([float(sum(scores)), float(len(scores))], device=accelerator.device)
            sums = accelerator.reduce(sums, reduction="sum")
            metrics[validation_metric(budget)] = float(sums[0] / sums[1])
        return metrics

    def _checkpoint(self, done: int, *, validate: bool = False) -> None:
        state = checkpointing.TrainState(
            done, config_hash(self.job), self.sampler.state(), self.accelerator.num_processes, self.last_metrics
        )
        if self.accelerator.is_main_process:
            self.inputs.logger.flush()
        with tempfile.TemporaryDirectory(prefix="parcelray-checkpoint-") as name:
            folder = Path(name)
            checkpointing.save(
                folder,
                accelerator=self.accelerator,
                model=self.model,
                optimizer=self.optimizer,
                processor=self.inputs.processor,
                state=state,
            )
            # Every rank reports, or the others wait for ever.
            self.inputs.report(
                {**self.last_metrics, "step": float(done)},
                folder if self.accelerator.is_main_process else None,
                validate,
            )

    def _log(self, metrics: dict[str, float], done: int) -> None:
        if self.accelerator.is_main_process:
            self.inputs.logger.log_metrics(metrics, done)


class _Clock:
    """Tokens per second since the last metric point, without the time of validations and checkpoints."""

    def __init__(self) -> None:
        self._started, self._tokens = time.perf_counter(), 0

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def rate(self) -> float:
        return self._tokens / (time.perf_counter() - self._started)

    def restart_if(self, due: bool) -> None:
        if due:
            self._started, self._tokens = time.perf_counter(), 0


def _num_tokens(batch: TensorBatch, budgets: tuple[int, ...]) -> int:
    """Text and visual tokens that this rank's decoder sees in a step."""
    text = int(batch.attention_mask_BS.sum())
    return sum(text + batch.pixel_values_ICHW.shape[0] * budget for budget in budgets)


def _check_finite(loss: float, norm: float, step: int, precision: str) -> None:
    """Every step, so that no checkpoint holds lost weights, to which every restart would go back."""
    # Under fp16 the loss scaler skips steps whose gradients overflow.
    if not math.isfinite(loss) or (not math.isfinite(norm) and precision != "fp16"):
        raise SystemFailure(
            f"The loss at step {step} is {loss} and the gradient norm {norm}; "
            "lower optimizer.learning_rate or training.clip_norm, or use precision bf16 or fp32."
        )


def _sync_only_last(accelerator: Accelerator, model: torch.nn.Module, *, last: bool) -> AbstractContextManager[None]:
    return nullcontext() if last else accelerator.no_sync(model)


def _accelerator(training: TrainingConfig, layer_classes: Sequence[str], *, cpu_only: bool) -> Accelerator:
    plugin = None
    if training.strategy == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=list(layer_classes),
            cpu_ram_efficient_loading=False,
        )
    return Accelerator(
        cpu=cpu_only,
        mixed_precision="no" if training.precision == "fp32" else training.precision,
        fsdp_plugin=plugin,
        # A budget without queries leaves the query path unused in that step.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
