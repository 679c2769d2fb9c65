"""What a search would do, before it does it: its points and an estimate of the compute."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch

from parcelray.cluster.session import ADDRESS_VARIABLE, default_num_cpus, ray_session
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.identity import identity
from parcelray.config.space_checks import check_search_space_of
from parcelray.config.tune import OptunaAlgorithm, PbtAlgorithm, RandomAlgorithm, TuneJob
from parcelray.evaluation.plan import evaluation_plan
from parcelray.training.plan import training_plan
from parcelray.tuning.run import trial_resources, wanted_concurrency
from parcelray.tuning.trial_resources import cluster_nodes

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TuningPlan:
    """The resolved search with its estimates."""

    identity: str
    trials: int
    points: int | None
    """Of the space; None: not finite."""
    objectives: tuple[str, ...]
    trial: Any
    """Plan of the space's own job, as one trial runs it."""
    seconds: float
    """All trials one after the other, a lower bound; a warm search runs the vision tower once an actor, not once a trial."""
    gpu_hours: float
    concurrent: int
    """Trials at the same time on the cluster that the search would run on."""
    cluster: str
    """Which one that is."""
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__} | {"trial": self.trial.to_dict()}

    def to_rich(self) -> "Table":
        """For the console."""
        from rich.table import Table

        table = Table("plan", self.identity, show_lines=False)
        table.add_row("trials", f"{self.trials:,}" + (f" of {self.points:,} points" if self.points is not None else ""))
        table.add_row("objectives", ", ".join(self.objectives))
        table.add_row("a trial", f"{self.trial.identity}, at least {self.trial.seconds / 60:,.1f} min")
        table.add_row("at the same time", f"{self.concurrent} on {self.cluster}")
        table.add_row("time", f"at least {self.seconds / self.concurrent / 60:,.1f} min")
        table.add_row("GPU hours", f"at least {self.gpu_hours:,.2f}" if self.gpu_hours else "none")
        return table


def tuning_plan(job: TuneJob, address: str | None = None) -> TuningPlan:
    """Resolves a search, checks that its parts fit together, and estimates its cost.

    Args:
        job: the search.
        address: of the Ray cluster that it would run on; None: RAY_ADDRESS, else a local instance, which is not started
            for this.

    Raises:
        UserError: the space does not fit its job, the job cannot run, or the cluster can never hold a trial.
    """
    check_search_space_of(job)
    nodes, cluster = _nodes(address)
    concurrent = trial_resources(job).concurrency(nodes, wanted_concurrency(job))
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


def _nodes(address: str | None) -> tuple[Sequence[Mapping[str, float]], str]:
    """Resources of the cluster's nodes, and how to call it."""
    named = address or os.environ.get(ADDRESS_VARIABLE)
    if ray.is_initialized() or (named is not None and named != "local"):
        with ray_session(address) as session:
            return cluster_nodes(), f"the cluster at {session.address}"
    gpus = torch.cuda.device_count()
    return [{"CPU": float(default_num_cpus()), "GPU": float(gpus)}], f"a local Ray of {default_num_cpus()} CPUs" + (
        f" and {gpus} GPUs" if gpus else ""
    )
