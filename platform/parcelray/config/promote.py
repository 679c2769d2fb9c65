"""What a model version must show before it becomes the champion: `jobs/promote/*.yaml`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from parcelray.config.base import StrictModel
from parcelray.config.evaluate import BenchmarkChoice, EvaluateJob, PassConfig
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.serve import EngineConfig
from parcelray.config.train import TrackingConfig


class RetentionGate(StrictModel):
    """The least percentage of the reference's score that is kept, the mean over splits."""

    overall: dict[int, float] = Field(default_factory=dict)
    """By budget (visual tokens per image): over all splits."""
    families: dict[str, dict[int, float]] = Field(default_factory=dict)
    """By family and budget: over its splits."""


class RegressionGate(StrictModel):
    """How much worse than the champion the candidate may be, by a paired test on the same samples.

    A budget passes if a loss of more than the margin is ruled out: the lower end of the 95 % interval of the paired
    difference lies above minus the margin. More samples make the interval narrower.
    """

    margin: float = Field(ge=0)
    """Points of the mean score over splits."""
    family_margin: float | None = Field(default=None, ge=0)
    """Points of the mean score over a family's splits; null: families are not tested."""


class GoldenAnswer(StrictModel):
    """A question that every champion answers rightly."""

    benchmark: str
    """One of the job's."""
    sample: str
    """Its id."""
    budgets: tuple[int, ...] = Field(min_length=1)
    """At which visual tokens per image it must be right."""
    answers: tuple[str, ...] = ()
    """Legal answers, letter by letter; none: what the benchmark's metric counts as right."""


class LatencyGate(StrictModel):
    """The longest time that one question may take alone on the engine that serves, in this process on this machine when the gate runs."""

    at_most_ms: dict[int, float] = Field(min_length=1)
    """By budget: 95th percentile over the questions, from the encoded image to the answer, milliseconds."""
    questions: int = Field(default=20, ge=5)
    """Questions of the first benchmark that are timed, after one that is not."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the model, as in the job that serves it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs, as there."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of its arithmetic on a CPU, as there; null: all cores."""
    engine: EngineConfig = EngineConfig()
    """As there; but features of images are never kept, since every image is new."""


class GateSet(StrictModel):
    """All gates. Signature, manifest and weights without pickle are always checked."""

    retention: RetentionGate | None = None
    """Against the reference; null: not asked."""
    regression: RegressionGate | None = None
    """Against the champion; null: not asked. Where there is no champion yet it passes."""
    golden: tuple[GoldenAnswer, ...] = ()
    """Questions that must be answered rightly."""
    latency: LatencyGate | None = None
    """How long an answer may take; null: not asked."""


class PromoteJob(StrictModel):
    """One promotion: a candidate, what it is asked, and what it must reach."""

    kind: Literal["promote"]
    """What the file describes."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    """Short name, part of the run's identity."""
    model: str = Field(pattern=r"^[A-Za-z0-9][\w-]{0,99}$")
    """The registered model whose champion is chosen."""
    candidate: str = "challenger"
    """A version (`3`), an alias, or a checkpoint folder, which becomes the next version and the challenger."""
    reference: CheckpointModelConfig | None = None
    """The uncompressed model that retention is measured against; null: the candidate itself at its largest budget."""
    benchmarks: tuple[BenchmarkChoice, ...] = Field(min_length=1)
    """What is asked, as in an evaluation."""
    catalog: tuple[str, ...] = ()
    """As in an evaluation."""
    budgets: tuple[int, ...] = Field(min_length=1)
    """Visual tokens per image."""
    gates: GateSet
    """What must be reached."""
    seed: int = Field(default=0, ge=0)
    """Of the rows that a `limit` draws."""
    compute: PassConfig = PassConfig()
    """How the cluster is used."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow: the registry is in its store."""
    storage: str = "runs"
    """As in an evaluation, whose answers it shares."""

    @model_validator(mode="before")
    @classmethod
    def _version_as_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("candidate"), int):
            return data | {"candidate": str(data["candidate"])}
        return data

    @model_validator(mode="after")
    def _check(self) -> "PromoteJob":
        gates = self.gates
        asked = (
            []
            if gates.retention is None
            else [*gates.retention.overall, *(each for family in gates.retention.families.values() for each in family)]
        )
        asked += [budget for golden in gates.golden for budget in golden.budgets]
        missing = sorted(set(asked) - set(self.budgets))
        if missing:
            raise ValueError(
                f"gates name the budgets {missing}, which are not among budgets {list(self.budgets)}; add them there"
            )
        unknown = sorted({golden.benchmark for golden in gates.golden} - {choice.name for choice in self.benchmarks})
        if unknown:
            raise ValueError(
                f"golden answers name the benchmarks {unknown}, which are not among the job's; add them there"
            )
        if self.tracking.uri is None:
            raise ValueError("tracking.uri is null, but the registry is in the tracking store; name one")
        # What an evaluation refuses (a benchmark named twice, budgets below 1) is refused here, too.
        self.evaluation("gate", "candidate")
        return self

    def evaluation(self, name: str, reference: str) -> EvaluateJob:
        """The evaluation of one model on what the job asks.

        Args:
            name: of the evaluation.
            reference: of the model.
        """
        return EvaluateJob(
            kind="evaluate",
            name=name,
            model=CheckpointModelConfig(reference=reference),
            reference=self.reference,
            benchmarks=self.benchmarks,
            catalog=self.catalog,
            budgets=self.budgets,
            seed=self.seed,
            compute=self.compute,
            tracking=self.tracking,
            storage=self.storage,
        )
