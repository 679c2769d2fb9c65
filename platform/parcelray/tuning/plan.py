"""The plan of a search, for `parcelray tune --dry-run`: its points, its cost, and how many trials run at once."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch

from parcelray.cluster.capacity import Capacity, read_capacity
from parcelray.cluster.session import ADDRESS_VARIABLE, default_num_cpus, ray_session
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.identity import identity
from parcelray.config.space_checks import check_search_space_of
from parcelray.config.tune import OptunaAlgorithm, PbtAlgorithm, RandomAlgorithm, TuneJob
from parcelray.evaluation.plan import EvaluationPlan, evaluation_plan
from parcelray.training.plan import training_plan
from parcelray.tuning.run import trial_resources, wanted_concurrency

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TuningPlan:
    """A resolved search with estimates of its cost."""

    identity: str
    trials: int
    """Number of trials."""
    points: int | None
    """Number of points in the space; None if it is infinite."""
    objectives: tuple[str, ...]
    """The objectives, each as `max METRIC` or `min METRIC`."""
    trial: Any
    """Plan of one trial: a training plan or an evaluation plan."""
    seconds: float
    """Lower bound of the time of all trials one after the other, seconds.

    It counts the vision tower once per trial, although warm evaluations run it only once per actor.
    """
    gpu_hours: float
    """Estimated GPU hours of all trials."""
    concurrent: int
    """Number of trials that run at the same time on the cluster."""
    cluster: str
    """The cluster that the search would run on, in words."""
    config: dict[str, Any]
    """The resolved job."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON-serialisable values."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__} | {"trial": self.trial.to_dict()}

    def to_rich(self) -> "Table":
        """Returns the plan as a table."""
        from rich.table import Table

        table = Table("plan", self.identity, show_lines=False)
        table.add_row("trials", f"{self.trials:,}" + (f" of {self.points:,} points" if self.points is not None else ""))
        table.add_row("objectives", ", ".join(self.objectives))
        table.add_row("per trial", f"{self.trial.identity}, at least {self.trial.seconds / 60:,.1f} min")
        table.add_row("at the same time", f"{self.concurrent} on {self.cluster}")
        table.add_row("time", f"at least {self.seconds / self.concurrent / 60:,.1f} min")
        table.add_row("GPU hours", f"at least {self.gpu_hours:,.2f}" if self.gpu_hours else "none")
        for warning in self.trial.warnings if isinstance(self.trial, EvaluationPlan) else ():
            table.add_row("warning", warning)
        return table


def tuning_plan(job: TuneJob, address: str | None = None) -> TuningPlan:
    """Validates a search and estimates its cost.

    Args:
        job: the search.
        address: address of the Ray cluster; None: RAY_ADDRESS, else a local instance, which is not started.

    Raises:
        UserError: the space does not fit its job, the job cannot run, or the cluster cannot run a single trial.
    """
    check_search_space_of(job)
    capacity, cluster = _capacity(address)
    concurrent = trial_resources(job).concurrency(capacity, wanted_concurrency(job))
    points, algorithm = job.space.size, job.algorithm
    if isinstance(algorithm, RandomAlgorithm | OptunaAlgorithm):
        trials = algorithm.trials if points is None else min(points, algorithm.trials)
    else:
        trials = algorithm.population if isinstance(algorithm, PbtAlgorithm) else points or 0
    trial: Any = evaluation_plan(job.base) if isinstance(job.base, EvaluateJob) else training_plan(job.base)
    gpus = job.base.compute.gpus_per_actor if isinstance(job.base, EvaluateJob) else 0.0
    seconds = trials * trial.seconds
    return TuningPlan(
        identity=identity(job),
        trials=trials,
        points=points,
        objectives=tuple(f"{each.mode} {each.metric}" for each in job.objectives),
        trial=trial,
        seconds=seconds,
        gpu_hours=trials * trial.gpu_hours if not isinstance(job.base, EvaluateJob) else seconds / 3600 * gpus,
        concurrent=max(1, min(concurrent, trials)),
        cluster=cluster,
        config=job.model_dump(mode="json"),
    )


def _capacity(address: str | None) -> tuple[Capacity, str]:
    """Returns the capacity of the cluster, and a description of the cluster."""
    named = address or os.environ.get(ADDRESS_VARIABLE)
    if ray.is_initialized() or (named is not None and named != "local"):
        with ray_session(address) as session:
            return read_capacity(), f"the cluster at {session.address}"
    gpus = torch.cuda.device_count()
    node = {"CPU": float(default_num_cpus()), "GPU": float(gpus)}
    return Capacity((node,)), f"a local Ray of {default_num_cpus()} CPUs" + (f" and {gpus} GPUs" if gpus else "")
