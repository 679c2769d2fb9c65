"""Job files of training runs: `jobs/train/*.yaml`."""

import math
import warnings
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from parcelray.config.adaptation import PARTS, AttentionBackend, LoraConfig, ModelPart
from parcelray.config.base import StrictModel
from parcelray.config.connector import ConnectorConfig
from parcelray.config.data import DataConfig
from parcelray.config.model import CheckpointModelConfig, ModelConfig
from parcelray.config.optimizer import AdamWConfig, OptimizerConfig, ScheduleConfig
from parcelray.config.paths import LocalPath, TrackingUri, check_storage
from parcelray.errors import describe_values


class BudgetRange(StrictModel):
    """The budgets start, start + step, ... up to and including stop."""

    start: int = Field(ge=1)
    """Smallest budget, visual tokens per image."""
    stop: int = Field(ge=1)
    """Largest budget, visual tokens per image."""
    step: int = Field(default=2, ge=1)
    """Difference between two budgets (2 in the paper, which trains even budgets)."""

    @model_validator(mode="after")
    def _check(self) -> "BudgetRange":
        if self.stop < self.start:
            raise ValueError(f"stop {self.stop} is below start {self.start}; swap them")
        return self

    def values(self) -> tuple[int, ...]:
        """The budgets, ascending."""
        return tuple(range(self.start, self.stop + 1, self.step))


BudgetValues = BudgetRange | tuple[int, ...]
"""Budgets as a range or a list."""


def _ascending(budgets: BudgetValues) -> tuple[int, ...]:
    """The budgets in ascending order.

    Raises:
        ValueError: the list is empty, has a value below 1, or has a value twice.
    """
    if isinstance(budgets, BudgetRange):
        return budgets.values()
    values = tuple(sorted(budgets))
    if not values:
        raise ValueError("budgets is empty; list at least one visual-token budget")
    if values[0] < 1 or len(set(values)) < len(values):
        raise ValueError(f"budgets {list(budgets)} is not a list of distinct budgets of at least 1; correct the list")
    return values


class _Budgets(StrictModel):
    budgets: BudgetValues = BudgetRange(start=16, stop=256)
    """Budgets to draw from (visual tokens per image): a range or a list."""
    anchor_grids: tuple[int, ...] | None = None
    """Sides of the anchor grids of a supernet over anchor/query splits; 0: no anchors.

    Each step also draws one of the sides that fit its budget. null: the connector's routing decides.
    """

    @model_validator(mode="after")
    def _check_budgets(self) -> "_Budgets":
        smallest = self.values()[0]
        if self.anchor_grids is not None and not any(
            side >= 0 and side * side <= smallest for side in self.anchor_grids
        ):
            raise ValueError(
                f"none of the anchor_grids {list(self.anchor_grids)} fits the smallest budget, {smallest}; add one"
                " whose square is at most that budget"
            )
        return self

    def values(self) -> tuple[int, ...]:
        """The budgets, ascending."""
        return _ascending(self.budgets)


class UniformBudgets(_Budgets):
    """One budget per step, drawn uniformly (arXiv 2605.30126, Appendix E)."""

    type: Literal["uniform"] = "uniform"


class LogUniformBudgets(_Budgets):
    """One budget per step, drawn uniformly on a logarithmic scale: as many steps from 16 to 32 as from 32 to 64."""

    type: Literal["log_uniform"] = "log_uniform"


class Stratum(StrictModel):
    """Budgets that together get a fixed share of the steps."""

    share: float = Field(gt=0, allow_inf_nan=False)
    """Share of the steps, relative to the sum of all shares."""
    budgets: BudgetValues
    """Budgets of the stratum: a range or a list."""
    draw: Literal["uniform", "log_uniform"] = "uniform"
    """Distribution over the budgets of the stratum."""

    @model_validator(mode="after")
    def _check(self) -> "Stratum":
        self.values()
        return self

    def values(self) -> tuple[int, ...]:
        """The budgets, ascending."""
        return _ascending(self.budgets)


class StratifiedBudgets(_Budgets):
    """One budget per step, drawn from strata of budgets that each get a fixed share of the steps."""

    type: Literal["stratified"] = "stratified"
    strata: tuple[Stratum, ...] | None = None
    """The strata, which may overlap and together contain exactly `budgets`.

    null: the strata follow the connector's routing. A quarter of the steps is shared equally by the smallest budgets
    of all routing intervals (only anchors). Three quarters go to the other budgets, uniformly within an interval and
    twice as often to each interval as to the one before it. Budgets with the same number of anchors are an interval.
    """

    @model_validator(mode="after")
    def _check(self) -> "StratifiedBudgets":
        if self.strata is None:
            if self.anchor_grids is not None:
                raise ValueError(
                    "strata is null, so they follow the routing, but anchor_grids replaces the routing; list the strata"
                )
            return self
        members = {budget for stratum in self.strata for budget in stratum.values()}
        if members != set(self.values()):
            raise ValueError(
                f"strata must contain exactly the budgets {describe_values(self.values())}; missing:"
                f" {_first(set(self.values()) - members)}; not among them: {_first(members - set(self.values()))}."
                " Change strata or budgets"
            )
        return self


def _first(budgets: set[int]) -> str:
    """The smallest budgets as text; `none` without budgets."""
    return (", ".join(map(str, sorted(budgets)[:5])) or "none") + (", ..." if len(budgets) > 5 else "")


class WeightedBudgets(_Budgets):
    """One budget per step, drawn with the given weights."""

    type: Literal["weighted"] = "weighted"
    weights: tuple[float, ...] = Field(min_length=1)
    """One positive weight per budget, in ascending order of the budgets."""

    @model_validator(mode="after")
    def _check(self) -> "WeightedBudgets":
        if len(self.weights) != len(self.values()) or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                f"weights has {len(self.weights)} entries for {len(self.values())} budgets; give one positive weight"
                " per budget"
            )
        return self


class SandwichBudgets(_Budgets):
    """Three budgets per step on the same batch: the smallest, the largest and a random one in between."""

    type: Literal["sandwich"] = "sandwich"


BudgetConfig = Annotated[
    UniformBudgets | LogUniformBudgets | StratifiedBudgets | WeightedBudgets | SandwichBudgets,
    Field(discriminator="type"),
]


class DistillationConfig(StrictModel):
    """In-place distillation: each step also runs its batch at the largest budget, the teacher of the smaller budgets.

    The largest budget is trained on the labels. The loss of a smaller budget is (1 - weight) x cross-entropy + weight x
    KL divergence from the logits of the largest budget, which get no gradient from it.
    """

    weight: float = Field(default=0.5, gt=0, le=1)
    """Weight of the KL divergence."""


class TrainingConfig(StrictModel):
    """Length and numerics of the training."""

    steps: int = Field(ge=1)
    """Number of optimizer steps."""
    images_per_step: int = Field(default=32, ge=1)
    """Images per optimizer step over all workers; a batch of n-image samples has images_per_step / n samples."""
    max_text_tokens: int | None = Field(default=None, ge=1)
    """Largest number of text tokens of a prompt with its answers; longer rows cannot be used. null: no limit."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Number of micro-batches per worker and step; the gradient is that of the whole batch."""
    group_by_tokens: bool = False
    """Whether the samples of a step have similar length, so that all workers have as much to do, and micro-batches are
    padded only to their own longest prompt. The lengths are known for the rows of conversations and of `hub` data."""
    loss_mean: Literal["prompts", "tokens"] = "prompts"
    """How answers are weighted in the loss of a step, over all workers and micro-batches.

    prompts: all prompts equally, whatever the length of their answers (PaliGemma); tokens: all answer tokens equally
    (LLaVA).
    """
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest global gradient norm; larger gradients are scaled down to this norm."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward and backward pass.

    Weights, gradients and optimizer state are fp32 with every value, whatever the data type of the start checkpoint.
    """
    kernels: Literal["stock"] | None = None
    """Kernels of the training steps on CPUs; GPUs always use those of torch.

    null: on CPUs with AMX, bf16 passes use the platform's attention for training; on other CPUs they run in fp32, which
    is faster there. stock: torch's attention, in the data type that `precision` names; slower, for comparisons.
    """
    attention: AttentionBackend | None = None
    """Attention backend of the decoder: eager, sdpa, flash (package flash-attn) or flex (torch's FlexAttention).

    flash and flex need GPUs. null: sdpa if it is exact, else (soft-capped logits of Gemma-2) eager.
    """
    compile: bool = False
    """Whether the layers of vision tower and decoder are compiled (torch.compile); the first steps take minutes."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Distribution of the model over workers: replicated (ddp), or sharded (fsdp; on GPUs only, CPUs replicate)."""
    patch_supervision: float = Field(default=0.0, ge=0)
    """Weight of an auxiliary loss: at each visual token the decoder predicts the word for what the patch shows.

    It applies only to data with labelled regions, at the budget of the full patch grid. Models from scratch need it to
    learn to use the image.
    """
    freeze: tuple[ModelPart, ...] = ()
    """Parts of the model whose weights stay as they are: a list of tower, connector, projector and decoder."""
    lora: LoraConfig | None = None
    """Low-rank adapters by part of the model; null: all weights that are not frozen are trained themselves."""
    activation_checkpointing: bool = False
    """Whether the layers of vision tower and decoder are computed again in the backward pass.

    Then only their inputs are kept, which takes less memory and about a third more time. The gradients are the same.
    """
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between logged metrics, including token diagnostics."""

    @field_validator("freeze")
    @classmethod
    def _in_order(cls, parts: tuple[ModelPart, ...]) -> tuple[ModelPart, ...]:
        return tuple(part for part in PARTS if part in parts)

    @model_validator(mode="after")
    def _check_parts(self) -> "TrainingConfig":
        if self.freeze == PARTS:
            raise ValueError(f"freeze has all parts ({', '.join(PARTS)}), so nothing is trained; remove one")
        for part, _ in self.lora.parts() if self.lora is not None else ():
            if part in self.freeze:
                raise ValueError(
                    f"lora.{part} has adapters, but freeze has {part}, too; remove it from freeze, as the weights"
                    " under adapters are frozen anyway"
                )
        return self

    def trains_whole(self, part: ModelPart) -> bool:
        """Whether all weights of a part are trained themselves: it is not frozen and has no adapters."""
        return part not in self.freeze and (self.lora is None or getattr(self.lora, part) is None)


class ValidationConfig(StrictModel):
    """Validation during training."""

    every_steps: int = Field(default=0, ge=0)
    """Number of steps between validations; 0: only at the end."""
    samples: int = Field(default=64, ge=1)
    """Number of samples per family (or per question kind)."""
    budgets: tuple[int, ...] = Field(default=(16, 64, 256), min_length=1)
    """Visual-token budgets to score."""
    in_background: bool = False
    """Whether a separate task scores the checkpoints while the workers continue to train; it needs Ray workers.

    false: the workers pause the training and share the validation.
    """
    background_gpus: float = Field(default=0.0, ge=0)
    """Number of GPUs of the separate task; 0: CPU only."""


class ReportConfig(StrictModel):
    """Scores on the test split after training, compared with the majority class and the blind model."""

    samples: int = Field(default=500, ge=1)
    """Number of samples per family.

    For NLVR: per question kind; statements are taken as whole sentences of six samples each.
    """
    budgets: tuple[int, ...] = Field(default=(16, 64, 256), min_length=1)
    """Visual-token budgets to score."""


class CheckpointingConfig(StrictModel):
    """Checkpoints of the training state."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints; the last step always saves one."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep."""
    model_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the weights of the finished model; null: float32, the weights exactly as trained.

    The checkpoints that a training resumes from are always float32.
    """


class ScalingConfig(StrictModel):
    """Workers of the Ray Train run."""

    num_workers: int | tuple[int, int] = 1
    """Number of workers, or [min, max] for an elastic group; 0: train in this process, without Ray."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """Logical CPUs per worker."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs per worker."""
    data_tasks_per_worker: int = Field(default=1, ge=1)
    """Number of concurrent Ray Data tasks that prepare batches for each worker."""
    max_failures: int = Field(default=2, ge=-1)
    """Largest number of restarts of the worker group after failures; -1: no limit."""
    wait_s: float = Field(default=1800.0, gt=0)
    """Longest wait for free resources, and for nodes that the autoscaler starts, before the training, seconds."""

    @model_validator(mode="after")
    def _check(self) -> "ScalingConfig":
        low, high = self.bounds
        if low < 0 or high < low or (low == 0 and high != 0):
            raise ValueError(
                f"num_workers {self.num_workers} is not a worker count; give an integer of at least 0, or [min, max]"
                " with 1 <= min <= max"
            )
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest number of workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)


class TrackingConfig(StrictModel):
    """MLflow tracking of the run."""

    uri: TrackingUri | None = "sqlite:///runs/mlflow.db"
    """MLflow tracking URI; null: no tracking. A cluster of more than one node needs a tracking server."""
    experiment: str = "parcelray"
    """Name of the MLflow experiment."""


class StorageLimits(StrictModel):
    """Limits of the space that a job's files take; a search applies those of its base job."""

    finished_checkpoints: int | None = Field(default=None, ge=0)
    """Number of checkpoints to keep once a training is finished and its model is stored.

    null: all that `checkpointing.keep` has left on a disk, none on object storage.
    """
    predictions_gb: float | None = Field(default=None, gt=0)
    """Largest size of all stored predictions, GiB; null: no limit.

    At the end of an evaluation the oldest predictions beyond it are deleted, except those of the evaluation itself and
    of the last hour. An evaluation whose predictions were deleted computes them again when it is run again.
    """


def default_tracking() -> Any:
    """The content of a `tracking` section that is left out; it is validated with the job, so its path is the job's."""
    return {}


# Every class of pydantic has a method of this name, through its metaclass; instances have only the field.
warnings.filterwarnings("ignore", 'Field name "register" in "TrainJob" shadows', UserWarning)


class TrainJob(StrictModel):
    """Job file of one training run."""

    kind: Literal["train"]
    """Kind of the job."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Short name of the job, part of the run's identity."""
    seed: int = Field(default=0, ge=0)
    """Seed of weight initialisation, budgets and data order."""
    model: ModelConfig = CheckpointModelConfig()
    """Model that the training starts from."""
    connector: ConnectorConfig | None = None
    """Connector to insert with new weights; null: keep the checkpoint's own connector."""
    new_words: tuple[str, ...] | None = None
    """Words that become single tokens of the checkpoint's tokenizer, with new ids; null: none.

    Add the words of short answers that the tokenizer writes as several tokens. The ids of other tokens do not change.
    """
    data: DataConfig
    """Training data."""
    budget: BudgetConfig = UniformBudgets()
    """Visual-token budgets of the training steps."""
    distillation: DistillationConfig | None = None
    """In-place distillation from the largest budget; null: every budget is trained on the labels alone."""
    optimizer: OptimizerConfig = AdamWConfig()
    """Optimizer of the training."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule; it starts at step 0 in every training."""
    training: TrainingConfig
    """Length and numerics of the run."""
    validation: ValidationConfig = ValidationConfig()
    """Validation during the training."""
    report: ReportConfig | None = None
    """Test scores after training; null: no report."""
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    """Checkpointing of the training state."""
    scaling: ScalingConfig = ScalingConfig()
    """Workers of Ray Train."""
    register: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")
    """Registered model that the trained model becomes a new version of; null: it is not registered."""
    tracking: TrackingConfig = Field(default_factory=default_tracking)
    """MLflow tracking."""
    storage: LocalPath = "runs"
    """Folder or URI (s3://..., gs://...) of the run; with several nodes, every node must have access to it."""
    storage_limits: StorageLimits = StorageLimits()
    """Limits of the space that the run takes."""

    @model_validator(mode="after")
    def _check(self) -> "TrainJob":
        check_storage(self.storage, in_process=self.scaling.bounds[1] == 0)
        if self.validation.in_background and self.scaling.bounds[1] == 0:
            raise ValueError(
                "validation.in_background needs Ray workers, but scaling.num_workers is 0; change one of them"
            )
        if self.register is not None and self.tracking.uri is None:
            raise ValueError(f"register is {self.register}, but tracking.uri is null; set it, or set register to null")
        for key, value in (("training.attention", self.training.attention), ("optimizer.type", self.optimizer.type)):
            if (
                value in ("flash", "flex", "adamw_8bit")
                and self.scaling.bounds[1] > 0
                and not self.scaling.gpus_per_worker
            ):
                raise ValueError(f"{key} is {value}, which needs GPUs; set scaling.gpus_per_worker, or change {key}")
        if self.new_words and not self.training.trains_whole("decoder"):
            raise ValueError(
                "new_words adds embeddings to the decoder, but training.freeze or training.lora leaves them untrained;"
                " set new_words to null, or train the decoder"
            )
        if self.distillation is not None and len(self.budget.values()) == 1:
            raise ValueError(
                f"distillation needs a smaller budget than the largest, but the only budget is"
                f" {self.budget.values()[0]}; add others to budget.budgets, or set distillation to null"
            )
        return self
