"""`parcelray bench tune`: what warm actors save in a split search, and what a trial costs over its bare training, side by side in one run."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from parcelray.cluster.session import ray_session
from parcelray.cluster.tuning_run import train_point, trial_job
from parcelray.cluster.warm_evaluation import WarmEvaluator
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.search_space import Assignment
from parcelray.config.train import TrainJob
from parcelray.config.tune import TuneJob
from parcelray.evaluation.bundles import PassSettings
from parcelray.models.checkpoint import ResolvedCheckpoint, content_digest, resolve_checkpoint, write_manifest
from parcelray.profiling.measure import Measure, Report, interquartile_range, machine_info
from parcelray.training.in_process import fit_in_process
from parcelray.training.metric_logger import NoMetrics
from parcelray.training.start import build_start
from parcelray.tuning.planner import make_planner
from parcelray.tuning.training_trial import DRIVER_CPUS, training_trial
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord
from parcelray.tuning.tune_run import TrialResources, evaluation_trial, run_search

_WARM_GOAL = ">= 3"
_BUDGETS = ([16], [32], [64])
_GRIDS = (0, 1, 2, 4)


def bench_tuning(*, samples: int, steps: int, repeats: int) -> Report:
    """Points per minute of a split search in warm actors and with a process for every point; and a trial's seconds over its bare training.

    The searched model is a supernet over splits with a connector that was not trained: speed does not hang on the weights. Every search has
    an answer store of its own, so no answer is reused.

    Args:
        samples: questions per family of the mini suite.
        steps: of the training whose overhead is measured.
        repeats: of each comparison.
    """
    rates: dict[str, list[float]] = {"warm": [], "a process per point": []}
    overheads, shares = [], []
    with tempfile.TemporaryDirectory(prefix="parcelray-bench-") as name, ray_session():
        root = Path(name)
        checkpoint = _supernet(root / "supernet")
        for index in range(repeats):
            for kind in rates:
                rates[kind].append(_points_per_minute(root / f"{kind}-{index}", checkpoint, samples, warm=kind == "warm"))
            bare, trial = _training_seconds(root / f"training-{index}", steps)
            overheads.append(trial - bare)
            shares.append(trial / bare)
    ratios = [warm / cold for warm, cold in zip(*rates.values(), strict=True)]
    measures = [
        *(Measure(f"split search, {kind}", statistics.median(values), "points/min", interquartile_range(values)) for kind, values in rates.items()),
        Measure("warm over a process per point", statistics.median(ratios), "ratio", interquartile_range(ratios), _WARM_GOAL, "a process per point"),
        Measure("training trial minus bare training", statistics.median(overheads), "s", interquartile_range(overheads), None, "the same training in-process"),
        Measure(f"training trial over bare training, {steps} steps", statistics.median(shares), "ratio", interquartile_range(shares), None, "the same"),
    ]
    return Report(tuple(measures), machine_info())


def _points_per_minute(folder: Path, checkpoint: ResolvedCheckpoint, samples: int, *, warm: bool) -> float:
    job = _search(folder, checkpoint, samples)
    assert isinstance(job.base, EvaluateJob)
    evaluator = WarmEvaluator(job.base, checkpoint, content_digest(checkpoint.path), ((), 256), PassSettings(**job.base.compute.model_dump()))
    record = TrialRecord(folder)
    planner = make_planner(job.space, job.algorithm, job.objectives, job.seed, record)
    started = time.perf_counter()
    run_search(
        evaluation_trial(functools.partial(_measure, evaluator), job.objectives[0]),
        planner,
        record,
        _Silent(),
        folder=folder,
        resources=TrialResources(1.0),
        max_concurrent=2,
        reuse_actors=warm,
    )
    return 60 * planner.num_points / (time.perf_counter() - started)


def _training_seconds(folder: Path, steps: int) -> tuple[float, float]:
    """Of the same training: bare in this process, and as a trial, its process's start included."""
    search = _training_search(folder, steps)
    bare_job = trial_job(search, str(folder / "bare"), {"seed": 0})
    start = resolve_checkpoint("mini_base").path
    started = time.perf_counter()
    fit_in_process(bare_job, folder / "bare" / "run", checkpoint=start, logger=NoMetrics())
    bare = time.perf_counter() - started
    record = TrialRecord(folder)
    planner = make_planner(search.space, search.algorithm, search.objectives, 0, record)
    started = time.perf_counter()
    trial = training_trial(functools.partial(train_point, search, str(folder / "trials")), search.objectives[0])
    run_search(trial, planner, record, _Silent(), folder=folder, resources=TrialResources(1.0 + DRIVER_CPUS), max_concurrent=1)
    return bare, time.perf_counter() - started


def _supernet(folder: Path) -> ResolvedCheckpoint:
    job = TrainJob.model_validate(_training(folder, 1) | {"connector": {"type": "parcel", "num_heads": 6, "anchor_grids": list(_GRIDS)}})
    model, processor = build_start(job, resolve_checkpoint("mini_base").path)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_manifest(folder, config={}, git_commit=None, data=None, seed=0)
    return resolve_checkpoint(str(folder))


def _search(folder: Path, checkpoint: ResolvedCheckpoint, samples: int) -> TuneJob:
    space = {
        "kind": "search_space",
        "name": "splits",
        "job": "bench",
        "parameters": {"anchor_grid": {"type": "choice", "values": list(_GRIDS)}, "budgets": {"type": "choice", "values": list(_BUDGETS)}},
    }
    base = {
        "kind": "evaluate",
        "name": "bench",
        "model": {"reference": str(checkpoint.path)},
        "benchmarks": [{"name": "mini", "source": {"samples": samples}}],
        "compute": {"actors": 2},
        "tracking": {"uri": None},
        "storage": str(folder),
    }
    return _tune_job(folder, space, base, "score")


def _training_search(folder: Path, steps: int) -> TuneJob:
    space = {"kind": "search_space", "name": "seed", "job": "bench", "parameters": {"seed": {"type": "choice", "values": [0]}}}
    return _tune_job(folder, space, _training(folder, steps), "val/score@64")


def _tune_job(folder: Path, space: Mapping[str, object], base: Mapping[str, object], metric: str) -> TuneJob:
    return TuneJob.model_validate(
        {
            "kind": "tune",
            "name": "bench",
            "space": space,
            "base": base,
            "algorithm": {"type": "grid"},
            "objectives": [{"metric": metric, "mode": "max"}],
            "tracking": {"uri": None},
            "storage": str(folder),
        }
    )


def _training(folder: Path, steps: int) -> dict[str, object]:
    return {
        "kind": "train",
        "name": "bench",
        "connector": {"type": "parcel", "num_heads": 6},
        "data": {"type": "mini"},
        "training": {"steps": steps, "images_per_step": 16, "precision": "bf16"},
        "validation": {"samples": 2, "budgets": [64]},
        "checkpointing": {"every_steps": steps},
        "scaling": {"num_workers": 0},
        "tracking": {"uri": None},
        "storage": str(folder),
    }


def _measure(evaluator: WarmEvaluator) -> Callable[[Assignment], Mapping[str, float]]:
    return evaluator.metrics


class _Silent:
    """Tells nobody; see `SearchObserver`."""

    def started(self, key: str, assignment: Assignment) -> None:
        """A trial runs."""

    def reported(self, key: str, metrics: Mapping[str, float], steps: int) -> None:
        """A training has got to a step."""

    def finished(self, trial: FinishedTrial) -> None:
        """A trial has ended.

        Raises:
            RuntimeError: it failed, so nothing was measured.
        """
        if trial.error is not None:
            raise RuntimeError(f"the trial {trial.assignment} failed: {trial.error}")
