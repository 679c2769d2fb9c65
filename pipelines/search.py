"""Runs the searches of `make search`: the split of every budget on one supernet, and the number of clusters.

It trains the supernet, and the baselines M3 and MQT with the same number of steps. It then searches 63 splits, and
clusters on the mini LLaVA; no point needs a training. With --confirm it also trains a few splits separately, to check
the supernet's ranking.

    python pipelines/search.py [--confirm] [--set a.b=c ...]

A key that starts with `splits.` or `clusters.` belongs to that search, any other key to the training of the supernet.
Re-run the same command to resume; a run that is finished computes nothing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from parcelray.cli.scripts import overrides_of, run_script
from parcelray.cluster.session import ray_session
from parcelray.config.identity import config_hash
from parcelray.config.loader import load_job_of
from parcelray.config.paths import written
from parcelray.config.train import TrainJob
from parcelray.config.tune import TuneJob
from parcelray.tracking.mlflow_tracker import tracked_run
from parcelray.tracking.store import ensure_store
from parcelray.training.run import run_training
from parcelray.tuning.confirm import confirm_splits
from parcelray.tuning.run import run_tuning

JOBS = Path(__file__).resolve().parent.parent / "jobs"
BASELINES = {
    "m3": {"connector": {"type": "m3"}, "budget": {"type": "uniform", "budgets": [4, 16, 64, 256]}},
    "mqt": {
        "connector": {"type": "mqt", "num_heads": 6},
        "budget": {"type": "uniform", "budgets": {"start": 4, "stop": 256, "step": 4}},
    },
}
"""Changes of the supernet's training for each baseline: its connector, and the budgets of its own paper."""
CONFIRM = "--confirm"


def jobs_of(overrides: Sequence[str]) -> tuple[TrainJob, TuneJob, TuneJob]:
    """Returns the training of the supernet and the two searches, with the overrides of each applied."""
    own = {
        name: [each.removeprefix(name) for each in overrides if each.startswith(name)]
        for name in ("splits.", "clusters.")
    }
    supernet = load_job_of(
        TrainJob, JOBS / "train" / "supernet.yaml", [each for each in overrides if not each.startswith(tuple(own))]
    )
    # As written: the paths of the checkpoints are part of the identities of the searches.
    folder = written(supernet.storage)
    storage = [
        f"storage={folder}",
        f"base.storage={folder}",
        f"tracking.uri={written(supernet.tracking.uri or 'null')}",
    ]
    # A URI is no `Path`, which would drop one of its slashes.
    trained = f"{folder.rstrip('/')}/train"
    models = [f"base.model.reference={trained}/{supernet.name}/model"]
    models += [f"baselines.{name.upper()}={trained}/{baseline_job(supernet, name).name}/model" for name in BASELINES]
    splits = load_job_of(TuneJob, JOBS / "tune" / "anchor_query_split.yaml", [*storage, *models, *own["splits."]])
    clusters = load_job_of(TuneJob, JOBS / "tune" / "cluster_count.yaml", [*storage, *own["clusters."]])
    return supernet, splits, clusters


def run(arguments: list[str], console: Console) -> None:
    """Runs the trainings and searches that are not finished."""
    supernet, splits, clusters = jobs_of(overrides_of([argument for argument in arguments if argument != CONFIRM]))
    uri = ensure_store(supernet.tracking.uri or "sqlite:///runs/mlflow.db")
    name = f"pipeline-search-{config_hash(supernet)}"
    with (
        tracked_run(uri, supernet.tracking.experiment, name, params={"steps": supernet.training.steps}) as run_id,
        ray_session(),
    ):
        for job in (supernet, *(baseline_job(supernet, name) for name in BASELINES)):
            run_training(job, console, parent_run_id=run_id, report=False)
        found = run_tuning(splits, console, resume=True, parent_run_id=run_id)
        run_tuning(clusters, console, resume=True, parent_run_id=run_id)
        if CONFIRM in arguments:
            confirm_splits(splits, found, console)


def baseline_job(supernet: TrainJob, baseline: str) -> TrainJob:
    """Returns the training of a baseline from the same base, with the supernet's data, steps and seed."""
    return TrainJob.model_validate(
        supernet.model_dump() | {"name": f"{supernet.name}-{baseline}"} | BASELINES[baseline]
    )


def main() -> int:
    """Runs the pipeline."""
    return run_script(lambda console: run(sys.argv[1:], console))


if __name__ == "__main__":
    sys.exit(main())
