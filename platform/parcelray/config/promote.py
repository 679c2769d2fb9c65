"""Job files of promotions: the gates that a model version must pass to become the champion (`jobs/promote/*.yaml`)."""

from typing import Any, Literal

from pydantic import Field, model_validator

from parcelray.config.base import StrictModel
from parcelray.config.evaluate import BenchmarkChoice, EvaluateJob, PassConfig
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.paths import LocalPath, ModelReference
from parcelray.config.reducer import ReducerConfig
from parcelray.config.serve import EngineConfig
from parcelray.config.train import StorageLimits, TrackingConfig, default_tracking


class RetentionGate(StrictModel):
    """Smallest retention of the reference's score, percent, as the mean over splits."""

    overall: dict[int, float] = Field(default_factory=dict)
    """Smallest retention over all splits, by budget (visual tokens per image)."""
    families: dict[str, dict[int, float]] = Field(default_factory=dict)
    """Smallest retention over the splits of a family, by family and budget."""


class RegressionGate(StrictModel):
    """Largest loss against the champion, by a paired test on the same samples.

    A budget passes if the lower end of the 95 % confidence interval of the paired difference is above minus the
    margin. More samples make the interval narrower.
    """

    margin: float = Field(ge=0)
    """Margin in points of the mean score over all splits."""
    family_margin: float | None = Field(default=None, ge=0)
    """Margin in points of the mean score over the splits of a family; null: families are not tested."""


class GoldenAnswer(StrictModel):
    """A question that every champion must answer correctly."""

    benchmark: str
    """Name of one of the job's benchmarks."""
    sample: str
    """Id of the sample."""
    budgets: tuple[int, ...] = Field(min_length=1)
    """Budgets (visual tokens per image) at which the answer must be correct."""
    answers: tuple[str, ...] = ()
    """Accepted answers, compared exactly; empty: any answer that the benchmark's metric scores as correct."""


class LatencyGate(StrictModel):
    """Largest latency of single requests on the serving engine, measured in this process on this machine."""

    at_most_ms: dict[int, float] = Field(min_length=1)
    """Largest 95th percentile over the questions, by budget, milliseconds from the encoded image to the answer."""
    questions: int = Field(default=20, ge=5)
    """Number of timed questions of the first benchmark, after one warm-up question."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the model; use the same as in the serve job."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the model; use the same as in the serve job."""
    threads: int | None = Field(default=None, ge=1)
    """Number of CPU threads; use the same as in the serve job. null: all cores."""
    engine: EngineConfig = EngineConfig()
    """Engine settings; use the same as in the serve job. The feature cache is always off, as every image is new."""


class GateSet(StrictModel):
    """All promotion gates; signature, manifest and pickle-free weights are always checked."""

    retention: RetentionGate | None = None
    """Retention against the reference; null: not checked."""
    regression: RegressionGate | None = None
    """Regression against the champion; null: not checked. It passes if there is no champion yet."""
    golden: tuple[GoldenAnswer, ...] = ()
    """Questions that must be answered correctly."""
    latency: LatencyGate | None = None
    """Latency of single requests; null: not checked."""


class PromoteJob(StrictModel):
    """Job file of one promotion: a candidate, its evaluation and the gates that it must pass."""

    kind: Literal["promote"]
    """Kind of the job."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    """Short name of the job, part of the run's identity."""
    model: str = Field(pattern=r"^[A-Za-z0-9][\w-]{0,99}$")
    """Name of the registered model whose champion is selected."""
    candidate: ModelReference = "challenger"
    """Version (`3`), alias, or checkpoint (folder or URI), which is registered as the next version and challenger."""
    reducer: ReducerConfig | None = None
    """Training-free reducer of the candidate, as in an evaluate job; the gates evaluate with it.

    A version that is promoted keeps it, and the endpoint serves with it. null: the candidate's connector.
    """
    reference: CheckpointModelConfig | None = None
    """Uncompressed model for the retention metric; null: the candidate itself at its largest budget."""
    benchmarks: tuple[BenchmarkChoice, ...] = Field(min_length=1)
    """Benchmarks to evaluate, as in an evaluate job."""
    catalog: tuple[LocalPath, ...] = ()
    """YAML files with additional benchmarks, as in an evaluate job."""
    budgets: tuple[int, ...] = Field(min_length=1)
    """Budgets to evaluate, visual tokens per image."""
    gates: GateSet
    """Gates that the candidate must pass."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random subset that a benchmark's `limit` selects."""
    compute: PassConfig = PassConfig()
    """Cluster resources of the evaluation."""
    tracking: TrackingConfig = Field(default_factory=default_tracking)
    """MLflow tracking; its store also holds the model registry."""
    storage: LocalPath = "runs"
    """Folder or URI of predictions and results, as in an evaluate job; evaluations share the predictions."""
    storage_limits: StorageLimits = StorageLimits()
    """Limits of the space that the predictions take."""

    @model_validator(mode="before")
    @classmethod
    def _version_as_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("candidate"), int):
            return data | {"candidate": str(data["candidate"])}
        return data

    @model_validator(mode="after")
    def _check(self) -> "PromoteJob":
        gates = self.gates
        gated = (
            []
            if gates.retention is None
            else [*gates.retention.overall, *(each for family in gates.retention.families.values() for each in family)]
        )
        gated += [budget for golden in gates.golden for budget in golden.budgets]
        missing = sorted(set(gated) - set(self.budgets))
        if missing:
            raise ValueError(
                f"gates use the budgets {missing}, which are not in budgets {list(self.budgets)}; add them to budgets"
            )
        unknown = sorted({golden.benchmark for golden in gates.golden} - {choice.name for choice in self.benchmarks})
        if unknown:
            raise ValueError(
                f"golden answers use the benchmarks {unknown}, which are not in benchmarks; add them to benchmarks"
            )
        if self.tracking.uri is None:
            raise ValueError("tracking.uri is null, but the model registry is in the tracking store; set tracking.uri")
        # An evaluation rejects further mistakes, such as a benchmark listed twice or budgets below 1.
        self.evaluation("gate", "candidate")
        return self

    def evaluation(self, name: str, reference: str, reducer: ReducerConfig | None = None) -> EvaluateJob:
        """Builds the evaluate job of one model on the benchmarks and budgets of this promotion.

        Args:
            name: name of the evaluate job.
            reference: reference of the model to evaluate.
            reducer: reducer of that model; None: none.
        """
        return EvaluateJob(
            kind="evaluate",
            name=name,
            model=CheckpointModelConfig(reference=reference),
            reducer=reducer,
            reference=self.reference,
            benchmarks=self.benchmarks,
            catalog=self.catalog,
            budgets=self.budgets,
            seed=self.seed,
            compute=self.compute,
            tracking=self.tracking,
            storage=self.storage,
            storage_limits=self.storage_limits,
        )
