"""The trainings and evaluations of the elastic study: every system with the same data, steps and optimizer.

Each run is an ordinary training or evaluation job with its own name, so that a finished one is found and an interrupted
one is resumed. Several processes can work on the same list: each takes the next run that no other one works on.
"""

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import changed
from parcelray.config.train import TrainJob
from parcelray.errors import UserError
from parcelray.evaluation.run import run_evaluation
from parcelray.models.vlm import connector_of
from parcelray.tracking.run_folder import RunFolder, storage_folder
from parcelray.training.run import run_training

VANILLA = "vanilla"
"""The base with all its patches, trained as long; retention is relative to it."""


@dataclass(frozen=True)
class System:
    """A system of the comparison."""

    label: str
    """Name in tables and figures."""
    changes: Mapping[str, Any]
    """Values, by key path, that differ from those of the job file."""


SYSTEMS: Mapping[str, System] = {
    VANILLA: System(
        "vanilla",
        {"connector": None, "budget": {"type": "uniform", "budgets": [256]}, "validation.budgets": [256]},
    ),
    "parcel": System("PARCEL", {}),
    # Without its smallest scale of 4 tokens, which is below the budgets of the comparison.
    "m3": System(
        "M3",
        {
            "connector": {"type": "m3", "positions": "image"},
            "budget": {"type": "uniform", "budgets": [16, 64, 256]},
        },
    ),
    "mqt": System(
        "MQT as published",
        {
            "connector": {"type": "mqt", "num_heads": 6, "start": "sincos", "positions": "contiguous"},
            "budget": {"type": "uniform", "budgets": {"start": 2, "stop": 256, "step": 2}},
        },
    ),
    "mqt_local": System(
        "MQT, local start",
        {"connector": {"type": "mqt", "num_heads": 6, "start": "local", "positions": "image"}},
    ),
}
"""The systems by name; the job file describes PARCEL."""


class Run(NamedTuple):
    """One training of a system."""

    system: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Name of its training job and of its evaluation job."""
        return f"elastic-{self.system}-{self.steps}-seed{self.seed}"


def runs_of(systems: Sequence[str], seeds: Sequence[int], steps: int) -> list[Run]:
    """Returns the runs in the order of their execution: all systems with one seed before the next seed.

    Raises:
        UserError: a system is unknown.
    """
    unknown = [name for name in systems if name not in SYSTEMS]
    if unknown or not systems or not seeds:
        raise UserError(
            f"systems are {', '.join(systems) or 'empty'} and seeds {', '.join(map(str, seeds)) or 'empty'}; give at"
            f" least one seed, and some of the systems {', '.join(SYSTEMS)}."
        )
    return [Run(system, seed, steps) for seed in seeds for system in systems]


def training_of(run: Run, job: TrainJob) -> TrainJob:
    """Returns the training job of a run; the seed also selects the scenes, equal for all systems."""
    own = {"name": run.name, "seed": run.seed, "data.seed": run.seed, "training.steps": run.steps}
    return changed(job, own | dict(SYSTEMS[run.system].changes), run.name)


def train_runs(runs: Sequence[Run], job: TrainJob, console: Console) -> None:
    """Trains the runs that are neither finished nor being trained by another process."""
    for each in [training_of(run, job) for run in runs]:
        with only_worker(each, console) as mine:
            if mine:
                run_training(each, console, report=False)


def evaluation_of(run: Run, job: TrainJob, evaluation: EvaluateJob) -> EvaluateJob:
    """Returns the evaluation job of a trained run, at those budgets of the job that its connector supports.

    Raises:
        UserError: the run is not trained.
    """
    folder = RunFolder(training_of(run, job))
    if folder.result() is None:
        raise UserError(
            f"{run.name} is not trained; test questions are used only when the trainings are finished. Run `python"
            f" pipelines/elastic.py train --systems {run.system} --seeds {run.seed} --steps {run.steps}` first."
        )
    model = folder.local_path("model")
    supported = connector_of(model).supported_budgets
    budgets = [each for each in evaluation.budgets if isinstance(each, str) or each in supported]
    return changed(
        evaluation,
        {"name": run.name, "model.reference": str(model), "budgets": budgets, "storage": job.storage},
        run.name,
    )


def evaluate_runs(runs: Sequence[Run], job: TrainJob, evaluation: EvaluateJob, console: Console) -> None:
    """Evaluates trained runs that no other process evaluates; stored predictions are reused.

    Raises:
        UserError: one of the runs is not trained.
    """
    # All jobs before the first evaluation, so that nothing is evaluated while a training is missing.
    for each in [evaluation_of(run, job, evaluation) for run in runs]:
        with only_worker(each, console) as mine:
            if mine:
                run_evaluation(each, console, tables=False)


@contextmanager
def only_worker(job: TrainJob | EvaluateJob, console: Console) -> Iterator[bool]:
    """Yields whether no other process of this machine works on a job; the kernel frees a job when its process ends."""
    path = storage_folder(job.storage) / "elastic" / f"{job.kind}-{job.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"{job.name}: another process is working on it; skipped.")
            yield False
            return
        yield True
