"""The plan of a training job for --dry-run: resolved configuration, and estimates of time, memory and GPU hours."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from parcelray.benchmarks.training_data import check_rows
from parcelray.config.identity import identity
from parcelray.config.optimizer import AdamW8bitConfig, AdamWConfig, OptimizerConfig
from parcelray.config.train import TrainJob
from parcelray.console import key_value_table
from parcelray.errors import UserError, describe_values
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.flops import cost
from parcelray.profiling.gpus import gpu_of
from parcelray.profiling.machine import matmul_flops_per_second
from parcelray.training.budget_sampling import BudgetSampler
from parcelray.training.planned_model import planned_model
from parcelray.training.start import prepare_model, step_reader
from parcelray.training.token_plan import dry_run_memory

_BACKWARD = 2
"""FLOPs of a backward pass per FLOP of the forward pass: one product for input gradients, one for weight gradients."""
_BYTES = 4
"""Bytes of one weight, gradient or optimiser moment: fp32, whatever the precision of the passes."""


@dataclass(frozen=True)
class TrainingPlan:
    """The resolved job and its estimated cost."""

    identity: str
    start: str
    num_parameters: int
    connector_parameters: int
    budgets: tuple[int, ...]
    schedule: str
    """Type of the budget schedule."""
    passes_per_step: float
    """Mean number of forward and backward passes of a step."""
    tokens_per_step: float
    """Mean number of visual tokens per image that the passes of a step have together."""
    workers: tuple[int, int]
    state_bytes: int
    """Bytes of the fp32 weights, gradients and optimiser moments on each worker, without activations.

    Frozen weights have neither gradients nor moments.
    """
    flops: int
    """Expected FLOPs of the forward and backward passes of all steps, by the cost model, without text tokens."""
    seconds: float
    """Time at the matrix-product speed measured on this machine; a lower bound, since training does not reach it."""
    gpu_hours: float
    config: dict[str, Any]
    peak_bytes: int | None = None
    """Predicted peak memory of a worker at the largest budget, weights included; None: not predicted."""
    gpu: str | None = None
    """Type of GPU that time and GPU hours are for; None: the speed measured on this machine."""
    trained_parameters: int = 0
    """Number of weights that are trained, adapters included."""
    note: str | None = None
    """What is not that of the real model; see `PlannedModel`."""

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-serialisable values."""
        return asdict(self)

    def to_rich(self) -> Table:
        """The plan as a table for the console."""
        budgets = (
            f"{self.budgets[0]} to {self.budgets[-1]} ({len(self.budgets)} budgets)"
            if len(self.budgets) > 3
            else ", ".join(map(str, self.budgets))
        )
        speed = "this machine's matrix-product speed" if self.gpu is None else f"the peak speed of one {self.gpu}"
        rows = {
            "starts from": self.start,
            "parameters": (
                f"{self.num_parameters:,} ({self.connector_parameters:,} of the connector);"
                f" {self.trained_parameters:,} are trained"
            ),
            "visual-token budgets": f"{budgets}, {self.schedule}",
            "mean of a step": (
                f"passes: {self.passes_per_step:.3g}, visual tokens per image: {self.tokens_per_step:.4g}"
            ),
            "workers": (
                " to ".join(str(count) for count in sorted(set(self.workers))) if self.workers[1] else "in this process"
            ),
            "memory per worker": (
                f"{self.state_bytes / 2**20:,.0f} MiB of fp32 weights, gradients, moments"
                + (f"; predicted peak {self.peak_bytes / 2**20:,.0f} MiB" if self.peak_bytes is not None else "")
            ),
            "compute": f"{self.flops / 1e12:,.1f} TFLOP",
            "time": f"at least {self.seconds / 60:,.1f} min at {speed}",
            "GPU hours": f"at least {self.gpu_hours:,.2f}" if self.gpu_hours else "none",
        }
        if self.note is not None:
            rows["note"] = self.note
        return key_value_table(rows, header=("plan", self.identity))


def training_plan(job: TrainJob, *, gpu: str | None = None, with_peak: bool = False) -> TrainingPlan:
    """Resolve a job, check that its parts fit together, and estimate its cost.

    Args:
        job: the training.
        gpu: type of GPU that time and GPU hours are for, see `profiling.gpus`; None: the speed of this machine.
        with_peak: whether to predict the peak memory of a worker, which takes seconds.

    Raises:
        UserError: the parts do not fit together: the connector does not support a budget, the data do not exist, or a
            step has too few samples.
    """
    check_rows(job.data)
    model, processor, start, note = planned_model(job)
    sampler = BudgetSampler(job.budget, job.seed, model.connector, with_largest=job.distillation is not None)
    if not set(job.validation.budgets) & set(model.supported_budgets):
        raise UserError(
            f"validation.budgets {job.validation.budgets} has no budget that {model.connector.name} supports; use some"
            f" of {describe_values(model.supported_budgets)}."
        )
    step_reader(job, processor, 0, max(1, job.scaling.bounds[0]))
    shape = from_transformers_config(model.config)
    connector = model.config.connector_config
    per_image = sampler.mean_per_step(
        lambda budget: cost(shape, connector, budget, num_frames=1, num_text_tokens=0).total
    )
    passes = 1 + _BACKWARD + int(job.training.activation_checkpointing)
    flops = round(passes * per_image * job.training.images_per_step * job.training.steps)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prepare_model(model, job)
    held = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    state_bytes = _BYTES * (held + trained) + _moment_bytes(job.optimizer) * trained
    low, high = job.scaling.bounds
    workers = max(1, low)
    speed = gpu_of(gpu).flops_per_second(job.training.precision) if gpu is not None else matmul_flops_per_second()
    seconds = flops / speed / workers
    gpus_per_worker = max(1.0, job.scaling.gpus_per_worker) if gpu is not None else job.scaling.gpus_per_worker
    is_sharded = job.training.strategy == "fsdp" and job.scaling.gpus_per_worker > 0
    return TrainingPlan(
        identity=identity(job),
        start=start,
        num_parameters=parameters,
        connector_parameters=sum(parameter.numel() for parameter in model.connector.parameters()),
        budgets=job.budget.values(),
        schedule=job.budget.type,
        passes_per_step=sampler.mean_per_step(lambda budget: 1),
        tokens_per_step=sampler.mean_per_step(float),
        workers=(low, high),
        state_bytes=state_bytes // (workers if is_sharded else 1),
        flops=flops,
        seconds=seconds,
        gpu_hours=seconds / 3600 * workers * gpus_per_worker,
        config=job.model_dump(mode="json"),
        peak_bytes=dry_run_memory(job, model.config, processor).total if with_peak and not is_sharded else None,
        gpu=gpu,
        trained_parameters=trained,
        note=note,
    )


def _moment_bytes(optimizer: OptimizerConfig) -> int:
    """Bytes that the optimiser keeps for each trained weight."""
    if isinstance(optimizer, AdamW8bitConfig):
        return 2
    if isinstance(optimizer, AdamWConfig):
        return 2 * _BYTES
    return _BYTES if optimizer.momentum else 0
