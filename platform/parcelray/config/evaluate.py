"""Job files of evaluations: `jobs/evaluate/*.yaml`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from parcelray.config.base import StrictModel
from parcelray.config.benchmark import PromptFamily
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.paths import LocalPath, check_storage
from parcelray.config.reducer import ReducerConfig
from parcelray.config.train import StorageLimits, TrackingConfig, default_tracking

BudgetName = Literal["blind", "full"]
BLIND = 0
"""The budget of the blind baseline: no image and no visual tokens."""


class BenchmarkChoice(StrictModel):
    """One benchmark of the evaluation."""

    name: str
    """Benchmark name, as printed by `parcelray benchmarks list` or defined in a file of `catalog`."""
    label: str | None = Field(default=None, pattern=r"^[a-z0-9][A-Za-z0-9_]*$")
    """Name in the results, to evaluate one benchmark with two sources; null: its own name."""
    data: LocalPath | None = None
    """File or folder with the benchmark's data; null: the Hugging Face hub, or generated procedurally."""
    limit: int | None = Field(default=None, ge=1)
    """Number of rows to evaluate, a random subset of the images; null: all.

    Corpus-level metrics such as CIDEr and MME are not meaningful on a subset.
    """
    source: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the source: {samples: 250} (mini suite), {view: picture} (NLVR), {revision: COMMIT} (table)."""
    metric: str | None = None
    """Metric and variant such as `gqa:vlmevalkit`; null: the benchmark's for the prompt family."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Largest number of tokens of an answer; null: the benchmark's default."""
    decoding: Literal["greedy", "likelihood"] | None = None
    """Decoding method; null: the benchmark's default.

    `greedy`: the likeliest token at every position; `likelihood`: the likeliest of the question's choices,
    each in the form that the prompt asks for: its text or its letter.
    """


class PassConfig(StrictModel):
    """Use of the cluster by an evaluation; no setting changes a prediction."""

    actors: int = Field(default=1, ge=0)
    """Number of copies of the model; 0: evaluate in this process, without Ray."""
    cpus_per_actor: float = Field(default=1.0, ge=0)
    """Logical CPUs per actor."""
    gpus_per_actor: float = Field(default=0.0, ge=0)
    """GPUs per actor; with a fraction, several actors share one GPU."""
    threads_per_actor: int | None = Field(default=None, ge=1)
    """CPU threads per actor; null: the node's cores divided by the actors, or with 0 actors the process's default."""
    readers: int = Field(default=1, ge=1)
    """Number of concurrent tasks that read rows."""
    batch_size: int = Field(default=64, ge=1)
    """Images per batch of the vision tower and of the language model."""
    rows_per_shard: int = Field(default=128, ge=1)
    """Rows that are read, evaluated and stored together: the most that an actor loses in a crash."""
    feature_cache_gb: float = Field(default=1.0, ge=0)
    """Size of each actor's cache of patch features, GiB; a search reuses it between its trials."""
    wait_s: float = Field(default=1800.0, gt=0)
    """Longest wait for free resources, and for nodes that the autoscaler starts, before the pass, seconds."""
    stall_s: float = Field(default=600.0, gt=0)
    """Longest time without a finished shard, seconds, before the pass fails and names the stage that hangs."""


class EvaluateJob(StrictModel):
    """Job file of one evaluation: a checkpoint at one or more budgets on any number of benchmarks."""

    kind: Literal["evaluate"]
    """Kind of the job."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Short name of the job, part of the run's identity."""
    model: CheckpointModelConfig = CheckpointModelConfig()
    """Checkpoint to evaluate."""
    reducer: ReducerConfig | None = None
    """Training-free reducer between projector and decoder; null: the checkpoint's connector produces each budget.

    If the key is left out, `parcelray evaluate` takes the reducer that a registered version was promoted with.
    """
    anchor_grid: int | None = Field(default=None, ge=0)
    """Side of the anchor grid at every budget, for supernets over splits; null: the checkpoint's routing."""
    reference: CheckpointModelConfig | None = None
    """Uncompressed model for the retention metric, at all its patches; null: the checkpoint at its largest budget."""
    benchmarks: tuple[BenchmarkChoice, ...] = Field(min_length=1)
    """Benchmarks to evaluate; a plain name is short for {name: NAME}."""
    catalog: tuple[LocalPath, ...] = ()
    """YAML files, or folders of YAML files, with additional benchmarks."""
    budgets: tuple[int | BudgetName, ...] = Field(default=("blind", 16, 64, "full"), min_length=1)
    """Budgets in visual tokens per image; `blind`: no image; `full`: the largest budget that the connector supports."""
    prompt_family: PromptFamily = "paligemma"
    """Prompt family, which selects prompts, expected answers and metrics: paligemma or llava.

    It should be the family of the checkpoint.
    """
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the model's weights and arithmetic."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random subset that a benchmark's `limit` selects."""
    need_within: float = Field(default=5.0, ge=0, le=100)
    """Largest loss against the full score, percent, at the smallest budget that is reported as sufficient."""
    max_unscored: float = Field(default=0.02, ge=0, le=1)
    """Largest fraction of a benchmark's questions without prediction or score; above it the run fails."""
    mask_decoder: LocalPath | None = None
    """Path of the .npz file of PaliGemma's segmentation decoder, for referring segmentation; null: not available."""
    compute: PassConfig = PassConfig()
    """Cluster resources of the evaluation."""
    tracking: TrackingConfig = Field(default_factory=default_tracking)
    """MLflow tracking."""
    storage: LocalPath = "runs"
    """Folder or URI (s3://..., gs://...) of the predictions, which all evaluations share, and of the results.

    With several nodes, every node must have access to it.
    """
    storage_limits: StorageLimits = StorageLimits()
    """Limits of the space that the predictions take."""

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return (
            [{"name": each} if isinstance(each, str) else each for each in value]
            if isinstance(value, list | tuple)
            else value
        )

    @model_validator(mode="after")
    def _check(self) -> "EvaluateJob":
        check_storage(self.storage, in_process=self.compute.actors == 0)
        names = [choice.label or choice.name for choice in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"a benchmark is listed twice in {', '.join(names)}; list each once")
        if self.anchor_grid is not None and self.reducer is not None:
            raise ValueError(
                "anchor_grid and reducer exclude each other, as a reducer takes all patch tokens; remove one of them"
            )
        if any(isinstance(budget, int) and budget < 1 for budget in self.budgets) or len(set(self.budgets)) < len(
            self.budgets
        ):
            raise ValueError(
                f"budgets {list(self.budgets)} must be distinct; legal: integers of at least 1, `blind` and `full`"
            )
        return self


def budget_name(budget: int) -> str:
    """Name of a budget in tables and messages: its number of visual tokens, or `blind`."""
    return str(budget) if budget != BLIND else "blind"
