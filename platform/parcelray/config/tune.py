"""One search as data: `jobs/tune/*.yaml`. What is searched is a space; what a trial runs is the space's own job."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from parcelray.config.base import StrictModel
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.objectives import SCORES, Objective, check_objectives, check_space, is_measured_during
from parcelray.config.search_space import AnchorsFit, SearchSpace
from parcelray.config.train import TrackingConfig, TrainJob


class GridAlgorithm(StrictModel):
    """Every point of the space, once."""

    type: Literal["grid"] = "grid"


class RandomAlgorithm(StrictModel):
    """Different random points."""

    type: Literal["random"] = "random"
    trials: int = Field(ge=1)
    """How many; fewer where the space has fewer."""


class OptunaAlgorithm(StrictModel):
    """Points that Optuna's TPE proposes (Bergstra et al., NeurIPS 2011; with several objectives its multi-objective form)."""

    type: Literal["optuna"] = "optuna"
    trials: int = Field(ge=1)
    """How many; fewer where the space has fewer."""
    startup_trials: int = Field(default=10, ge=1)
    """Random ones before the first proposal."""
    batch: int = Field(default=4, ge=1)
    """Points that are proposed together, before any of them is known.

    A batch waits for the one before it, so a search depends on its seed and
    not on the cluster."""


class PbtAlgorithm(StrictModel):
    """Population-based training (Jaderberg et al., 2017) over Tune's scheduler: trainings in segments, the worse half going on from the better."""

    type: Literal["pbt"] = "pbt"
    population: int = Field(ge=2)
    """Trainings at the same time; the cluster must hold them all."""
    segments: int = Field(ge=2)
    """Times that the population is compared; the job's steps are divided by it."""
    quantile: float = Field(default=0.5, gt=0, le=0.5)
    """Share that copies, and share that is copied."""


SearchAlgorithm = Annotated[
    GridAlgorithm | RandomAlgorithm | OptunaAlgorithm | PbtAlgorithm, Field(discriminator="type")
]


class AshaScheduler(StrictModel):
    """Asynchronous successive halving (Li et al., MLSys 2020).

    It only stops, never pauses, and the first trials pass every rung.
    """

    type: Literal["asha"] = "asha"
    grace_steps: int = Field(ge=1)
    """Steps that every training gets."""
    reduction: int = Field(default=3, ge=2)
    """One in so many goes on at each rung."""


class HyperBandScheduler(StrictModel):
    """HyperBand (Li et al., JMLR 2018): pauses trainings at each rung and goes on with the best."""

    type: Literal["hyperband"] = "hyperband"
    reduction: int = Field(default=3, ge=2)
    """One in so many goes on at each rung."""


class MedianScheduler(StrictModel):
    """Stops a training whose best score is below the median of the others' means at the same step (Golovin et al., KDD 2017)."""

    type: Literal["median"] = "median"
    grace_steps: int = Field(ge=1)
    """Steps that every training gets."""
    min_trials: int = Field(default=3, ge=2)
    """Trainings that have reached a step before one can be stopped there."""


EarlyStopping = Annotated[AshaScheduler | HyperBandScheduler | MedianScheduler, Field(discriminator="type")]


class ConfirmConfig(StrictModel):
    """The check of a split search by real trainings from the base: the best splits of one budget, the paper's, and the worst."""

    job: TrainJob
    """The training; its connector's routing and its budget become each split's.

    In a file: a job file's path, or {job: PATH, set: {...}}.
    """
    budget: int = Field(ge=1)
    """The budget whose splits are trained."""
    best: int = Field(default=3, ge=1)
    """How many of the best."""
    worst: int = Field(default=1, ge=0)
    """How many of the worst; without any, a correlation over a few good ones says little."""


class AdaptiveConfig(StrictModel):
    """Budgets chosen per image and question, on the answers of a split search and drawn on its frontier."""

    budgets: tuple[int, ...] = Field(min_length=2)
    """That are chosen between: budgets of the space, each at the split that the search chose for it."""


class TuneJob(StrictModel):
    """One whole search."""

    kind: Literal["tune"]
    """What the file describes."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Short name, part of the search's identity."""
    seed: int = Field(default=0, ge=0)
    """Seed of the points."""
    space: SearchSpace
    """What is searched. In a file: the path of the space's file."""
    base: Annotated[EvaluateJob | TrainJob, Field(discriminator="kind")]
    """What a trial changes and runs: the space's job.

    In a file: key paths and values that differ from the job file's.
    """
    algorithm: SearchAlgorithm
    """Which points are tried."""
    early_stopping: EarlyStopping | None = None
    """Of trainings, on the first objective."""
    objectives: tuple[Objective, ...] = Field(min_length=1, max_length=4)
    """What is wanted; the first is what early stopping, the best so far and the importance of parameters look at."""
    evaluation: EvaluateJob | None = None
    """Of trainings: asked of each trained model, as its `model`; what it measures can be an objective, and retention where it names a
    `reference`. In a file: {job: PATH, set: {...}}."""
    baselines: dict[str, str] = Field(default_factory=dict)
    """By name, checkpoints that are evaluated at the searched budgets and drawn beside the frontier, such as M3 and MQT; those not there are left out."""
    adaptive: AdaptiveConfig | None = None
    """Of a split search by retention (or score) and tokens: what choosing the budget per image and question adds, without one more answer."""
    confirm: ConfirmConfig | None = None
    """Real trainings of a few splits, after the search."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """At most so many trials at the same time; null: as many trainings as the cluster holds, or as many evaluations as `base.compute.actors`."""
    stall_s: float = Field(default=300.0, gt=0)
    """Longest time in which trials wait and no process of any computes, seconds, before the search gives up and says why."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    storage: str = "runs"
    """Folder under which the search keeps its record; several nodes need one that all of them reach."""

    @field_validator("objectives")
    @classmethod
    def _once(cls, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
        names = [objective.metric for objective in objectives]
        if len(set(names)) < len(names):
            raise ValueError(f"an objective is named twice in {', '.join(names)}; name each once")
        return objectives

    @model_validator(mode="after")
    def _check(self) -> "TuneJob":
        evaluates = isinstance(self.base, EvaluateJob)
        check_space(self.space, self.base)
        check_objectives(self.objectives, self.base, self.evaluation, self.space)
        if evaluates and self.evaluation is not None:
            raise ValueError("evaluation is for trainings, but the space's job is an evaluation itself; leave it out")
        if evaluates and isinstance(self.algorithm, PbtAlgorithm):
            raise ValueError("pbt needs trainings, but the space's job is an evaluation; use grid, random or optuna")
        if self.early_stopping is not None and (evaluates or isinstance(self.algorithm, PbtAlgorithm)):
            raise ValueError("early_stopping is for trainings that grid, random or optuna chose; leave it out")
        first = self.objectives[0].metric
        if (
            self.early_stopping is not None
            and isinstance(self.base, TrainJob)
            and not is_measured_during(first, self.base)
        ):
            raise ValueError(
                f"early_stopping looks at the first objective, but {first} is not measured before a training's end;"
                " name val/score@BUDGET with base.validation.every_steps above 0, or a metric such as train/loss, or"
                " leave it out"
            )
        if isinstance(self.algorithm, GridAlgorithm) and self.space.size is None:
            raise ValueError(
                f"the space {self.space.name} has a real parameter, so it has no grid; use random or optuna"
            )
        if self.confirm is not None and self.splits is None:
            raise ValueError(
                f"confirm needs a space of splits, but {self.space.name} is not one of two parameters under"
                " anchors_fit; leave it out"
            )
        if self.adaptive is not None:
            self._check_adaptive(self.adaptive)
        return self

    def _check_adaptive(self, adaptive: AdaptiveConfig) -> None:
        if self.splits is None:
            raise ValueError(
                f"adaptive needs a space of splits, but {self.space.name} is not one of two parameters under"
                " anchors_fit; leave it out"
            )
        steps = self.space.parameters[self.splits.budget].steps or ()
        known = [min(step) if isinstance(step, list | tuple) else step for step in steps]
        unknown = [budget for budget in adaptive.budgets if budget not in known]
        if unknown:
            raise ValueError(
                f"adaptive.budgets has {unknown[0]}, which the space {self.space.name} does not search; legal:"
                f" {', '.join(map(str, known))}"
            )
        found = [objective.metric for objective in self.objectives]
        if found[0] not in SCORES or found[1:2] != ["tokens"]:
            raise ValueError(
                f"adaptive is drawn as retention or score against tokens, but the objectives are {', '.join(found)};"
                " put these first, or leave it out"
            )

    @property
    def splits(self) -> AnchorsFit | None:
        """The constraint that makes the space one of splits, with an anchor grid and a budget and nothing else; None if it is not."""
        found = next((constraint for constraint in self.space.constraints), None)
        is_split = (
            found is not None and isinstance(self.base, EvaluateJob) and set(self.space.parameters) == set(found.keys)
        )
        return found if is_split else None
