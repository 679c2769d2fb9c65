"""The searches on a laptop, run by `make search`: the split of every budget on one supernet, and the cluster count, without one training a point.

Trains the supernet and, as long, M3 and MQT to draw beside it; searches 63 splits; searches clusters on the mini LLaVA.
With --confirm it also trains a few splits by themselves, to see whether the supernet ranked them well.

    python pipelines/search.py [--confirm] [--set a.b=c ...]

A key that starts with `splits.` or `clusters.` is of that search, any other of the supernet's training. A second run
does nothing and says so; an interrupted one goes on where it was.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from parcelray.cli.scripts import overrides_of, run_script
from parcelray.cluster.session import ray_session
from parcelray.config.loader import config_hash, load_job_of
from parcelray.config.train import TrainJob
from parcelray.config.tune import TuneJob
from parcelray.tracking.mlflow_tracker import tracked_run
from parcelray.tracking.store import ensure_store
from parcelray.training.run import run_training
from parcelray.tuning.confirm import confirm_splits
from parcelray.tuning.run import run_tuning

JOBS = Path(__file__).resolve().parent.parent / "jobs"
RIVALS = {
    "m3": {"connector": {"type": "m3"}, "budget": {"type": "uniform", "budgets": [4, 16, 64, 256]}},
    "mqt": {
        "connector": {"type": "mqt", "num_heads": 6},
        "budget": {"type": "uniform", "budgets": {"start": 4, "stop": 256, "step": 4}},
    },
}
"""What they change in the supernet's training: their connectors, and the budgets of their own papers."""
CONFIRM = "--confirm"


def jobs_of(overrides: Sequence[str]) -> tuple[TrainJob, TuneJob, TuneJob]:
    """The supernet's training, and the searches for splits and for clusters, with the searches' own changes."""
    own = {
        name: [each.removeprefix(name) for each in overrides if each.startswith(name)]
        for name in ("splits.", "clusters.")
    }
    supernet = load_job_of(
        TrainJob, JOBS / "train" / "supernet.yaml", [each for each in overrides if not each.startswith(tuple(own))]
    )
    place = [
        f"storage={supernet.storage}",
        f"base.storage={supernet.storage}",
        f"tracking.uri={supernet.tracking.uri or 'null'}",
    ]
    trained = Path(supernet.storage) / "train"
    models = [f"base.model.reference={trained / supernet.name / 'model'}"]
    models += [f"rivals.{rival.upper()}={trained / rival_job(supernet, rival).name / 'model'}" for rival in RIVALS]
    splits = load_job_of(TuneJob, JOBS / "tune" / "anchor_query_split.yaml", [*place, *models, *own["splits."]])
    clusters = load_job_of(TuneJob, JOBS / "tune" / "cluster_count.yaml", [*place, *own["clusters."]])
    return supernet, splits, clusters


def run(arguments: list[str], console: Console) -> None:
    """Runs what is missing."""
    supernet, splits, clusters = jobs_of(overrides_of([argument for argument in arguments if argument != CONFIRM]))
    uri = ensure_store(supernet.tracking.uri or "sqlite:///runs/mlflow.db")
    name = f"pipeline-search-{config_hash(supernet)}"
    with (
        tracked_run(uri, supernet.tracking.experiment, name, params={"steps": supernet.training.steps}) as run_id,
        ray_session(),
    ):
        for job in (supernet, *(rival_job(supernet, rival) for rival in RIVALS)):
            run_training(job, console, parent_run_id=run_id, report=False)
        found = run_tuning(splits, console, resume=True, parent_run_id=run_id)
        run_tuning(clusters, console, resume=True, parent_run_id=run_id)
        if CONFIRM in arguments:
            confirm_splits(splits, found, console)


def rival_job(supernet: TrainJob, rival: str) -> TrainJob:
    """A rival from the same base, with the supernet's data, steps and seed."""
    return TrainJob.model_validate(supernet.model_dump() | {"name": f"{supernet.name}-{rival}"} | RIVALS[rival])


def main() -> int:
    """Runs the pipeline."""
    return run_script(lambda console: run(sys.argv[1:], console))


if __name__ == "__main__":
    sys.exit(main())
