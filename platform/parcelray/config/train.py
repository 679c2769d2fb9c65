"""One training run as data: `jobs/train/*.yaml`."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from parcelray.config.base import StrictModel
from parcelray.config.connector import ConnectorConfig
from parcelray.config.data import DataConfig
from parcelray.config.model import CheckpointModelConfig, ModelConfig


class BudgetRange(StrictModel):
    """Budgets start, start + step, ... up to stop (included)."""

    start: int = Field(ge=1)
    """Smallest budget, visual tokens per image."""
    stop: int = Field(ge=1)
    """Largest budget."""
    step: int = Field(default=2, ge=1)
    """Distance between budgets (the paper: even budgets, so 2)."""

    @model_validator(mode="after")
    def _check(self) -> "BudgetRange":
        if self.stop < self.start:
            raise ValueError(f"stop {self.stop} is below start {self.start}; write the smaller one first")
        return self

    def values(self) -> tuple[int, ...]:
        """The budgets, ascending."""
        return tuple(range(self.start, self.stop + 1, self.step))


class _Budgets(StrictModel):
    budgets: BudgetRange | tuple[int, ...] = BudgetRange(start=16, stop=256)
    """The budgets to draw from: a range, or a list."""
    anchor_grids: tuple[int, ...] | None = None
    """A supernet over splits: the side of the anchor grid is drawn, too, among those of these that fit the budget (0: no anchors). null: the
    connector's routing decides."""

    @model_validator(mode="after")
    def _not_empty(self) -> "_Budgets":
        if not self.values():
            raise ValueError("budgets is empty; list at least one visual-token budget")
        if self.anchor_grids is not None and not any(
            side >= 0 and side * side <= min(self.values()) for side in self.anchor_grids
        ):
            raise ValueError(
                f"none of the anchor_grids {list(self.anchor_grids)} fits the smallest budget, {min(self.values())};"
                " add one with at most as many cells"
            )
        return self

    def values(self) -> tuple[int, ...]:
        """The budgets, ascending."""
        return self.budgets.values() if isinstance(self.budgets, BudgetRange) else tuple(sorted(self.budgets))


class UniformBudgets(_Budgets):
    """One budget per step, each as likely (arXiv 2605.30126, Appendix E)."""

    type: Literal["uniform"] = "uniform"


class WeightedBudgets(_Budgets):
    """One budget per step, drawn with the given weights."""

    type: Literal["weighted"] = "weighted"
    weights: tuple[float, ...] = Field(min_length=1)
    """One positive weight per budget, ascending budgets."""

    @model_validator(mode="after")
    def _check(self) -> "WeightedBudgets":
        if len(self.weights) != len(self.values()) or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                f"weights has {len(self.weights)} entries for {len(self.values())} budgets; give one positive weight"
                " per budget"
            )
        return self


class SandwichBudgets(_Budgets):
    """Three budgets per step on the same batch: the smallest, the largest and a random one between."""

    type: Literal["sandwich"] = "sandwich"


BudgetConfig = Annotated[UniformBudgets | WeightedBudgets | SandwichBudgets, Field(discriminator="type")]


class _Optimizer(StrictModel):
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate of the shared (pretrained) weights."""
    connector_multiplier: float = Field(default=1.0, gt=0)
    """Factor on the learning rate of the new connector parameters."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices; vectors (norms, biases) have none."""


class AdamWConfig(_Optimizer):
    """AdamW."""

    type: Literal["adamw"] = "adamw"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""


class SgdConfig(_Optimizer):
    """Stochastic gradient descent."""

    type: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum."""


OptimizerConfig = Annotated[AdamWConfig | SgdConfig, Field(discriminator="type")]


class ScheduleConfig(StrictModel):
    """Learning rate over the steps: linear warm-up, then a decay to `final_fraction` of the peak."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
    final_fraction: float = Field(default=0.05, ge=0, le=1)
    """Learning rate at the last step as a fraction of the peak."""


class TrainingConfig(StrictModel):
    """Length and numerics of the training."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    images_per_step: int = Field(default=32, ge=1)
    """Images per optimiser step over all workers: a batch of samples with n images each holds images_per_step / n samples."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches that each worker splits its share of a step into."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest global gradient norm; larger gradients are scaled down to it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; weights stay fp32 under bf16 and fp16."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How the model is spread over workers: copies (ddp) or shards (fsdp)."""
    patch_supervision: float = Field(default=0.0, ge=0)
    """Weight of a loss on the patches themselves: at the place of each visual token the decoder is to name what the patch shows. Only
    where the data label regions and the budget is the full patch grid; what brings a model from scratch to see."""
    freeze_vision: bool = False
    """Keep the vision tower's weights as they are."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between metric points; token diagnostics come with them."""


class ValidationConfig(StrictModel):
    """Scores during training."""

    every_steps: int = Field(default=0, ge=0)
    """Steps between validations; 0: only at the end."""
    samples: int = Field(default=64, ge=1)
    """Samples per family (or per question kind)."""
    budgets: tuple[int, ...] = Field(default=(16, 64, 256), min_length=1)
    """Visual-token budgets to score."""
    in_background: bool = False
    """Score checkpoints in a task of their own while the workers train on; false: the workers stop and share the work.

    Needs Ray workers.
    """
    background_gpus: float = Field(default=0.0, ge=0)
    """GPUs of that task; 0: it computes on a CPU."""


class ReportConfig(StrictModel):
    """Scores after training, on the test split, beside the majority class and the blind model."""

    samples: int = Field(default=500, ge=1)
    """Samples per family; NLVR: whole sentences (six images each) up to this many samples, and as many per derived question."""
    budgets: tuple[int, ...] = Field(default=(16, 64, 256), min_length=1)
    """Visual-token budgets to score."""


class CheckpointingConfig(StrictModel):
    """Checkpoints of the training state."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep: int = Field(default=2, ge=1)
    """How many to keep."""


class ScalingConfig(StrictModel):
    """Workers of the Ray Train run."""

    num_workers: int | tuple[int, int] = 1
    """Worker count, or [min, max] for an elastic group; 0 trains in this process, without Ray."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """Logical CPUs per worker."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs per worker."""
    data_tasks_per_worker: int = Field(default=1, ge=1)
    """Ray Data tasks that prepare batches for each worker at the same time."""
    max_failures: int = Field(default=2, ge=-1)
    """Restarts of the worker group after failures; -1: without limit."""

    @model_validator(mode="after")
    def _check(self) -> "ScalingConfig":
        low, high = self.bounds
        if low < 0 or high < low or (low == 0 and high != 0):
            raise ValueError(
                f"num_workers {self.num_workers} is not a worker count; give a whole number from 0, or [min, max] with"
                " 1 <= min <= max"
            )
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest worker count."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)


class TrackingConfig(StrictModel):
    """Where the record of the run goes."""

    uri: str | None = "sqlite:///runs/mlflow.db"
    """MLflow tracking URI; null: no tracking. More than one node needs a server."""
    experiment: str = "parcelray"
    """MLflow experiment."""


class TrainJob(StrictModel):
    """One whole training run."""

    kind: Literal["train"]
    """What the file describes."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Short name, part of the run's identity."""
    seed: int = Field(default=0, ge=0)
    """Seed of weights, budgets and data order."""
    model: ModelConfig = CheckpointModelConfig()
    """What the training starts from."""
    connector: ConnectorConfig | None = None
    """Connector to insert, with new weights; null keeps the checkpoint's own."""
    data: DataConfig
    """What to train on."""
    budget: BudgetConfig = UniformBudgets()
    """Visual-token budgets of the steps."""
    optimizer: OptimizerConfig = AdamWConfig()
    """Optimiser."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule; starts anew in every training."""
    training: TrainingConfig
    """Length and numerics."""
    validation: ValidationConfig = ValidationConfig()
    """Scores during training."""
    report: ReportConfig | None = None
    """Scores after training; null: none."""
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    """Checkpoints."""
    scaling: ScalingConfig = ScalingConfig()
    """Ray Train workers."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    storage: str = "runs"
    """Folder or fsspec URI under which the run keeps its checkpoints; several nodes need one that all of them reach."""

    @model_validator(mode="after")
    def _check(self) -> "TrainJob":
        if self.validation.in_background and self.scaling.bounds[1] == 0:
            raise ValueError(
                "validation.in_background needs Ray workers, but scaling.num_workers is 0; set one of them"
            )
        return self
