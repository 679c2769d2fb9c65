"""Job files of searches: `jobs/tune/*.yaml`. A trial runs the job of the search space with changed values."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from parcelray.config.base import StrictModel
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.objectives import SCORES, Objective, check_objectives, check_space, is_measured_during
from parcelray.config.paths import LocalPath, ModelReference, check_storage
from parcelray.config.search_space import AnchorsFit, SearchSpace
from parcelray.config.train import TrackingConfig, TrainJob, default_tracking


class GridAlgorithm(StrictModel):
    """Grid search: every point of the space once."""

    type: Literal["grid"] = "grid"


class RandomAlgorithm(StrictModel):
    """Random search over distinct points."""

    type: Literal["random"] = "random"
    trials: int = Field(ge=1)
    """Number of trials; fewer if the space has fewer points."""


class OptunaAlgorithm(StrictModel):
    """Optuna's TPE (Bergstra et al., NeurIPS 2011), or its multi-objective form for several objectives."""

    type: Literal["optuna"] = "optuna"
    trials: int = Field(ge=1)
    """Number of trials; fewer if the space has fewer points."""
    startup_trials: int = Field(default=10, ge=1)
    """Number of random trials before the first proposal."""
    batch: int = Field(default=4, ge=1)
    """Number of points that are proposed together, before the result of any of them is known.

    Each batch waits for the previous one. The search therefore depends on its seed and not on the cluster.
    """


class PbtAlgorithm(StrictModel):
    """Population-based training (Jaderberg et al., 2017): after each segment, the worst trainings copy the best."""

    type: Literal["pbt"] = "pbt"
    population: int = Field(ge=2)
    """Number of concurrent trainings; the cluster must have resources for all of them."""
    segments: int = Field(ge=2)
    """Number of segments of equal length that the job's steps are divided into; trainings are compared after each."""
    quantile: float = Field(default=0.5, gt=0, le=0.5)
    """Fraction of the population that is replaced, which equals the fraction that is copied."""


SearchAlgorithm = Annotated[
    GridAlgorithm | RandomAlgorithm | OptunaAlgorithm | PbtAlgorithm, Field(discriminator="type")
]


class AshaScheduler(StrictModel):
    """Asynchronous successive halving (Li et al., MLSys 2020).

    It stops trials and never pauses them. The first trials pass every rung.
    """

    type: Literal["asha"] = "asha"
    grace_steps: int = Field(ge=1)
    """Smallest number of steps of each training."""
    reduction: int = Field(default=3, ge=2)
    """Reduction factor: one in this many trials continues after each rung."""


class HyperBandScheduler(StrictModel):
    """HyperBand (Li et al., JMLR 2018): pauses trainings at each rung and continues the best."""

    type: Literal["hyperband"] = "hyperband"
    reduction: int = Field(default=3, ge=2)
    """Reduction factor: one in this many trials continues after each rung."""


class MedianScheduler(StrictModel):
    """Median stopping rule (Golovin et al., KDD 2017).

    It stops a training whose best score is below the median of the other trainings' means at the same step.
    """

    type: Literal["median"] = "median"
    grace_steps: int = Field(ge=1)
    """Smallest number of steps of each training."""
    min_trials: int = Field(default=3, ge=2)
    """Number of trainings that must have reached a step before one can be stopped there."""


EarlyStopping = Annotated[AshaScheduler | HyperBandScheduler | MedianScheduler, Field(discriminator="type")]


class ConfirmConfig(StrictModel):
    """Confirmation of a split search by separate trainings of the best, the worst and the paper's splits."""

    job: TrainJob
    """Training job; its connector's routing and its budget are replaced by those of each split.

    In a job file: the path of a train job, or {job: PATH, set: {...}}.
    """
    budget: int = Field(ge=1)
    """Budget whose splits are trained, visual tokens per image."""
    best: int = Field(default=3, ge=1)
    """Number of best splits to train."""
    worst: int = Field(default=1, ge=0)
    """Number of worst splits to train; a correlation over a few good splits alone is not informative."""


class AdaptiveConfig(StrictModel):
    """Study of budgets chosen per image and question, from the predictions of a split search."""

    budgets: tuple[int, ...] = Field(min_length=2)
    """Budgets of the space to choose from, each at the split that the search selected for it."""


class TuneJob(StrictModel):
    """Job file of one search."""

    kind: Literal["tune"]
    """Kind of the job."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Short name of the job, part of the search's identity."""
    seed: int = Field(default=0, ge=0)
    """Seed of the proposed points."""
    space: SearchSpace
    """Search space. In a job file: the path of the space's file."""
    base: Annotated[EvaluateJob | TrainJob, Field(discriminator="kind")]
    """Job that each trial changes and runs.

    In a job file: a mapping of key paths to values that differ from the job file of the space.
    """
    algorithm: SearchAlgorithm
    """Search algorithm."""
    early_stopping: EarlyStopping | None = None
    """Early stopping of trainings on the first objective; null: every training runs to its end."""
    objectives: tuple[Objective, ...] = Field(min_length=1, max_length=4)
    """Objectives; early stopping, the best trial and parameter importance use the first one."""
    evaluation: EvaluateJob | None = None
    """Evaluation of each trained model, for searches over trainings; its metrics can be objectives.

    Retention needs the key `reference`. The key `model` is replaced. In a job file: {job: PATH, set: {...}}.
    """
    baselines: dict[str, ModelReference] = Field(default_factory=dict)
    """Baseline checkpoints by name, such as M3 and MQT, evaluated at the searched budgets and plotted.

    Missing checkpoints are skipped.
    """
    adaptive: AdaptiveConfig | None = None
    """Study of adaptive budgets, for a split search by retention (or score) and tokens; it reuses all predictions."""
    confirm: ConfirmConfig | None = None
    """Separate trainings of a few splits after the search; null: none."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Largest number of concurrent trials.

    null: as many trainings as the cluster has resources for, or as many evaluations as `base.compute.actors`.
    """
    wait_s: float = Field(default=1800.0, gt=0)
    """Longest wait for the resources of one trial (of the whole population for pbt) before the search, seconds."""
    stall_s: float = Field(default=300.0, gt=0)
    """Longest time without progress while trials wait, seconds; after it the search fails and reports the reason."""
    tracking: TrackingConfig = Field(default_factory=default_tracking)
    """MLflow tracking."""
    storage: LocalPath = "runs"
    """Folder or URI (s3://..., gs://...) of the search: its record, its trials, and the predictions of its evaluations.

    With several nodes, every node must have access to it. The `storage` of the base job is not used.
    """

    @field_validator("objectives")
    @classmethod
    def _unique(cls, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
        names = [objective.metric for objective in objectives]
        if len(set(names)) < len(names):
            raise ValueError(f"an objective is listed twice in {', '.join(names)}; list each once")
        return objectives

    @model_validator(mode="after")
    def _check(self) -> "TuneJob":
        check_storage(self.storage, in_process=False)
        evaluates = isinstance(self.base, EvaluateJob)
        check_space(self.space, self.base)
        check_objectives(self.objectives, self.base, self.evaluation, self.space)
        if evaluates and self.evaluation is not None:
            raise ValueError("evaluation is for trainings, but the space's job is an evaluation itself; remove it")
        if evaluates and isinstance(self.algorithm, PbtAlgorithm):
            raise ValueError("pbt needs trainings, but the space's job is an evaluation; use grid, random or optuna")
        if self.early_stopping is not None and (evaluates or isinstance(self.algorithm, PbtAlgorithm)):
            raise ValueError("early_stopping needs trainings and algorithm grid, random or optuna; remove it")
        first = self.objectives[0].metric
        if (
            self.early_stopping is not None
            and isinstance(self.base, TrainJob)
            and not is_measured_during(first, self.base)
        ):
            raise ValueError(
                f"early_stopping uses the first objective, but {first} is only measured at the end of a training; use"
                " val/score@BUDGET with base.validation.every_steps above 0 or a metric such as train/loss, or remove"
                " early_stopping"
            )
        if isinstance(self.algorithm, GridAlgorithm) and self.space.size is None:
            raise ValueError(
                f"the space {self.space.name} has a real-valued parameter and hence no grid; use random or optuna"
            )
        if self.confirm is not None and self.splits is None:
            raise ValueError(
                f"confirm needs a space of splits: exactly two parameters under anchors_fit, unlike {self.space.name};"
                " remove confirm"
            )
        if self.adaptive is not None:
            self._check_adaptive(self.adaptive)
        return self

    def _check_adaptive(self, adaptive: AdaptiveConfig) -> None:
        if self.splits is None:
            raise ValueError(
                f"adaptive needs a space of splits: exactly two parameters under anchors_fit, unlike {self.space.name};"
                " remove adaptive"
            )
        steps = self.space.parameters[self.splits.budget].steps or ()
        known = [min(step) if isinstance(step, list | tuple) else step for step in steps]
        unknown = [budget for budget in adaptive.budgets if budget not in known]
        if unknown:
            raise ValueError(
                f"adaptive.budgets has {unknown[0]}, which the space {self.space.name} does not search; legal:"
                f" {', '.join(map(str, known))}"
            )
        metrics = [objective.metric for objective in self.objectives]
        if metrics[0] not in SCORES or metrics[1:2] != ["tokens"]:
            raise ValueError(
                "adaptive needs retention or score as first objective and tokens as second, but the objectives are"
                f" {', '.join(metrics)}; reorder them, or remove adaptive"
            )

    @property
    def splits(self) -> AnchorsFit | None:
        """The constraint of a space of splits (an anchor grid, a budget and nothing else); None for other spaces."""
        first = next(iter(self.space.constraints), None)
        is_split = (
            first is not None and isinstance(self.base, EvaluateJob) and set(self.space.parameters) == set(first.keys)
        )
        return first if is_split else None
