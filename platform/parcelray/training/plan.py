"""The plan of a training job for --dry-run: resolved configuration, and estimates of time, memory and GPU hours."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from parcelray.benchmarks.training_data import check_rows
from parcelray.config.identity import identity
from parcelray.config.train import AdamWConfig, OptimizerConfig, TrainJob
from parcelray.console import key_value_table
from parcelray.errors import UserError, describe_values
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.flops import cost
from parcelray.profiling.machine import matmul_flops_per_second
from parcelray.training.budget_sampling import BudgetSampler
from parcelray.training.run import resolve_start
from parcelray.training.start import build_start, freeze, step_reader

_BACKWARD = 2
"""FLOPs of a backward pass per FLOP of the forward pass: one product for input gradients, one for weight gradients."""
_BYTES = 4
"""Bytes of one weight, gradient or optimiser moment: all are fp32, whatever the precision of the passes."""


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
        rows = {
            "starts from": self.start,
            "parameters": f"{self.num_parameters:,} ({self.connector_parameters:,} of the connector)",
            "visual-token budgets": f"{budgets}, {self.schedule}",
            "mean of a step": f"{self.passes_per_step:.3g} passes, {self.tokens_per_step:.4g} visual tokens per image",
            "workers": (
                " to ".join(str(count) for count in sorted(set(self.workers))) if self.workers[1] else "in this process"
            ),
            "memory per worker": f"at least {self.state_bytes / 2**20:,.0f} MiB of fp32 weights, gradients, moments",
            "compute": f"{self.flops / 1e12:,.1f} TFLOP",
            "time": f"at least {self.seconds / 60:,.1f} min at this machine's matrix-product speed",
            "GPU hours": f"at least {self.gpu_hours:,.2f}" if self.gpu_hours else "none",
        }
        return key_value_table(rows, header=("plan", self.identity))


def training_plan(job: TrainJob) -> TrainingPlan:
    """Resolve a job, check that its parts fit together, and estimate its cost.

    Raises:
        UserError: the parts do not fit together: the connector does not support a budget, the data do not exist, or a
            step has too few samples.
    """
    check_rows(job.data)
    start = resolve_start(job, job.tracking.uri)
    model, processor = build_start(job, start.path if start is not None else None)
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
    flops = round((1 + _BACKWARD) * per_image * job.training.images_per_step * job.training.steps)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    freeze(model, job.training)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    state_bytes = _BYTES * (parameters + (1 + _moments(job.optimizer)) * trained)
    low, high = job.scaling.bounds
    workers = max(1, low)
    seconds = flops / matmul_flops_per_second() / workers
    return TrainingPlan(
        identity=identity(job),
        start=start.pinned if start is not None else "random weights",
        num_parameters=parameters,
        connector_parameters=sum(parameter.numel() for parameter in model.connector.parameters()),
        budgets=job.budget.values(),
        schedule=job.budget.type,
        passes_per_step=sampler.mean_per_step(lambda budget: 1),
        tokens_per_step=sampler.mean_per_step(float),
        workers=(low, high),
        state_bytes=state_bytes // (workers if job.training.strategy == "fsdp" and job.scaling.gpus_per_worker else 1),
        flops=flops,
        seconds=seconds,
        gpu_hours=seconds / 3600 * workers * job.scaling.gpus_per_worker,
        config=job.model_dump(mode="json"),
    )


def _moments(optimizer: OptimizerConfig) -> int:
    """Number of values that the optimiser keeps for each trained weight."""
    if isinstance(optimizer, AdamWConfig):
        return 2
    return 1 if optimizer.momentum else 0
