"""One evaluation as data: `jobs/evaluate/*.yaml`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from parcelray.config.base import StrictModel
from parcelray.config.benchmark import PromptFamily
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.reducer import ReducerConfig
from parcelray.config.train import TrackingConfig

BudgetName = Literal["blind", "full"]
BLIND = 0
"""The budget of the blind baseline: no image and no visual tokens."""


class BenchmarkChoice(StrictModel):
    """One benchmark of the evaluation."""

    name: str
    """As `parcelray benchmarks list` shows it, or of a file in `catalog`."""
    data: str | None = None
    """File or folder of its data; null: the Hugging Face hub, or procedural."""
    limit: int | None = Field(default=None, ge=1)
    """Rows to ask, a random part of the images; null: all. CIDEr, MME and their like mean nothing on a part."""
    source: dict[str, Any] = Field(default_factory=dict)
    """Fields of its source to change: {samples: 250} of the mini suite, {view: picture} of NLVR, {revision: COMMIT} of a table."""
    metric: str | None = None
    """Metric and variant instead of its own: `anls:lmms_eval`."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer, tokens; null: the benchmark's own."""
    decoding: Literal["greedy", "likelihood"] | None = None
    """Instead of the benchmark's own: the likeliest token at every place, or the likeliest of the question's choices."""


class PassConfig(StrictModel):
    """How the pass uses the cluster; none of it changes an answer."""

    actors: int = Field(default=1, ge=0)
    """Copies of the model; 0: in this process, without Ray."""
    cpus_per_actor: float = Field(default=1.0, ge=0)
    """Logical CPUs of each."""
    gpus_per_actor: float = Field(default=0.0, ge=0)
    """GPUs of each; a fraction lets several share one."""
    threads_per_actor: int | None = Field(default=None, ge=1)
    """Threads of each on a CPU; null: the node's cores divided by the actors, or with 0 actors those of the process."""
    readers: int = Field(default=1, ge=1)
    """Tasks that read rows at the same time."""
    batch_size: int = Field(default=64, ge=1)
    """Images per batch of the encoder and of the decoder."""
    rows_per_shard: int = Field(default=128, ge=1)
    """Rows that are read, evaluated and stored together: the most that an actor loses in a crash."""
    feature_cache_gb: float = Field(default=1.0, ge=0)
    """GiB of patch features that each actor of a search keeps between its trials."""
    stall_s: float = Field(default=600.0, gt=0)
    """Longest time without a finished shard, seconds, before the pass fails and names the stage that hangs."""


class EvaluateJob(StrictModel):
    """One whole evaluation: a checkpoint at all its budgets on any number of benchmarks."""

    kind: Literal["evaluate"]
    """What the file describes."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Short name, part of the run's identity."""
    model: CheckpointModelConfig = CheckpointModelConfig()
    """The checkpoint."""
    reducer: ReducerConfig | None = None
    """A training-free reducer between the projector and the decoder; null: the checkpoint's own connector gives every budget."""
    anchor_grid: int | None = Field(default=None, ge=0)
    """Of a supernet over splits: side of the anchor grid at every budget; null: the checkpoint's routing."""
    reference: CheckpointModelConfig | None = None
    """The uncompressed model that retention is measured against, at all its patches; null: the checkpoint itself at its largest budget."""
    benchmarks: tuple[BenchmarkChoice, ...] = Field(min_length=1)
    """What is asked; a name alone stands for {name: NAME}."""
    catalog: tuple[str, ...] = ()
    """YAML files, or folders of them, with benchmarks of your own."""
    budgets: tuple[int | BudgetName, ...] = Field(default=("blind", 16, 64, "full"), min_length=1)
    """Visual tokens per image; `blind`: no image at all; `full`: the largest that the connector can give."""
    prompt_family: PromptFamily = "paligemma"
    """In whose words benchmarks are asked."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the model."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of rows under a limit."""
    need_within: float = Field(default=5.0, ge=0, le=100)
    """Percent of the full score that may be lost at the budget that a benchmark is said to need."""
    max_unscored: float = Field(default=0.02, ge=0, le=1)
    """Share of a benchmark's questions that may be unanswerable or unscorable before the run fails."""
    mask_decoder: str | None = None
    """The .npz file of PaliGemma's segmentation decoder, for referring segmentation."""
    compute: PassConfig = PassConfig()
    """Use of the cluster."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    storage: str = "runs"
    """Folder or fsspec URI of the answers (all evaluations share them) and folder of the results; several nodes need one that all reach."""

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
        names = [choice.name for choice in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"a benchmark is named twice in {', '.join(names)}; name each once")
        if self.anchor_grid is not None and self.reducer is not None:
            raise ValueError(
                "anchor_grid and reducer exclude each other: a reducer takes all patch tokens; leave one of them out"
            )
        if any(isinstance(budget, int) and budget < 1 for budget in self.budgets) or len(set(self.budgets)) < len(
            self.budgets
        ):
            raise ValueError(
                f"budgets {list(self.budgets)} are not different token counts from 1 on, `blind` or `full`"
            )
        return self


def budget_name(budget: int) -> str:
    """Name of a budget in tables and messages: its number of visual tokens, or `blind`."""
    return str(budget) if budget != BLIND else "blind"
