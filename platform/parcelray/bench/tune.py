"""`parcelray bench tune`: savings of warm actors in a split search, and overhead of a trial over its bare training."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from parcelray.bench.measure import Measure, Report, interquartile_range, machine_info
from parcelray.cluster.session import ray_session
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.search_space import Assignment
from parcelray.config.train import TrainJob
from parcelray.config.tune import TuneJob
from parcelray.models.checkpoint import ResolvedCheckpoint, resolve_checkpoint
from parcelray.models.manifest import write_manifest
from parcelray.tracking.metric_logger import NoMetrics
from parcelray.training.start import build_start
from parcelray.training.train_loop import fit_in_process
from parcelray.tuning.evaluate_trial import WarmEvaluator
from parcelray.tuning.planner import make_planner
from parcelray.tuning.training_points import train_point, training_resources, trial_job
from parcelray.tuning.training_trial import training_trial
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord
from parcelray.tuning.trial_resources import TrialResources
from parcelray.tuning.tune_run import evaluation_trial, run_search

_WARM_GOAL = ">= 3"
_FEW, _MANY = 1, 3
"""Numbers of trainings of a short and a long search; their difference in time is that of the extra trainings."""
_WORKERS = {"in its own process": 0, "on a Ray Train worker": 1}
_BUDGETS = ([16], [32], [64])
_GRIDS = (0, 1, 2, 4)


def bench_tuning(*, samples: int, steps: int, repeats: int, say: Callable[[str], None] = lambda line: None) -> Report:
    """Measures the speed of a split search with and without warm actors, and the overhead of a training trial.

    The time of a trial is the slope between a search with one training and a search with three, run sequentially. The
    start of Tune is therefore not part of it.

    The searched model is a supernet over splits with an untrained connector, because speed does not depend on the
    weights. Every search has its own prediction store, so no prediction is reused.

    Args:
        samples: number of questions per family of the mini suite.
        steps: number of steps of the training whose overhead is measured.
        repeats: number of rounds of each comparison.
        say: called with each part when it starts; a round takes minutes.
    """
    rates: dict[str, list[float]] = {"warm": [], "a process per point": []}
    trials: dict[str, list[float]] = {kind: [] for kind in _WORKERS}
    starts, bare = [], []
    with tempfile.TemporaryDirectory(prefix="parcelray-bench-") as name, ray_session():
        root = Path(name)
        checkpoint = _supernet(root / "supernet")
        for index in range(repeats):
            for kind in rates:
                say(f"round {index + 1} of {repeats}: split search, {kind}")
                rates[kind].append(
                    _points_per_minute(root / f"{kind}-{index}", checkpoint, samples, warm=kind == "warm")
                )
            say(f"round {index + 1} of {repeats}: bare training")
            bare.append(_bare_seconds(root / f"bare-{index}", steps))
            for kind, workers in _WORKERS.items():
                say(f"round {index + 1} of {repeats}: {_FEW} and {_MANY} training trials {kind}")
                few, many = (
                    _search_seconds(root / f"training-{index}-{workers}-{count}", steps, count, workers)
                    for count in (_FEW, _MANY)
                )
                trials[kind].append((many - few) / (_MANY - _FEW))
                if not workers:
                    starts.append(few - _FEW * trials[kind][-1])
    ratios = [warm / cold for warm, cold in zip(*rates.values(), strict=True)]
    alone = statistics.median(bare)
    measures = [
        *(
            Measure(f"split search, {kind}", statistics.median(values), "points/min", interquartile_range(values))
            for kind, values in rates.items()
        ),
        Measure(
            "warm over a process per point",
            statistics.median(ratios),
            "ratio",
            interquartile_range(ratios),
            _WARM_GOAL,
            "a process per point",
        ),
        Measure(f"bare training, {steps} steps", alone, "s", interquartile_range(bare)),
        Measure("start of a search", statistics.median(starts), "s", interquartile_range(starts)),
    ]
    for kind, values in trials.items():
        over = [value - alone for value in values]
        measures.append(
            Measure(
                f"training trial {kind} minus bare training",
                statistics.median(over),
                "s",
                interquartile_range(over),
                None,
                "bare training",
            )
        )
    return Report(tuple(measures), machine_info())


def _points_per_minute(folder: Path, checkpoint: ResolvedCheckpoint, samples: int, *, warm: bool) -> float:
    job = _search(folder, checkpoint, samples)
    assert isinstance(job.base, EvaluateJob)
    models = {job.base.model.reference: checkpoint}
    evaluator = WarmEvaluator(job.base, models, ((), 256))
    record = TrialRecord(folder)
    planner = make_planner(job.space, job.algorithm, job.objectives, job.seed, record)
    started = time.perf_counter()
    run_search(
        evaluation_trial(evaluator.metrics, job.objectives[0]),
        planner,
        record,
        [_Silent()],
        folder=folder,
        resources=TrialResources(1.0),
        max_concurrent=2,
        reuse_actors=warm,
    )
    return 60 * planner.num_points / (time.perf_counter() - started)


def _bare_seconds(folder: Path, steps: int) -> float:
    """Returns the seconds of the training in this process, without a search."""
    job = trial_job(_training_search(folder, steps, 1, 0), str(folder), {"seed": 0})
    start = resolve_checkpoint("mini_base").path
    started = time.perf_counter()
    fit_in_process(job, folder / "run", checkpoint=start, logger=NoMetrics())
    return time.perf_counter() - started


def _search_seconds(folder: Path, steps: int, count: int, workers: int) -> float:
    """Returns the seconds of a search over `count` trainings, run sequentially."""
    search = _training_search(folder, steps, count, workers)
    record = TrialRecord(folder)
    planner = make_planner(search.space, search.algorithm, search.objectives, 0, record)
    trial = training_trial(functools.partial(train_point, search, str(folder), ((), 0)), search.objectives[0])
    started = time.perf_counter()
    run_search(
        trial, planner, record, [_Silent()], folder=folder, resources=training_resources(search), max_concurrent=1
    )
    return time.perf_counter() - started


def _supernet(folder: Path) -> ResolvedCheckpoint:
    job = TrainJob.model_validate(
        _training(folder, 1) | {"connector": {"type": "parcel", "num_heads": 6, "anchor_grids": list(_GRIDS)}}
    )
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
        "parameters": {
            "anchor_grid": {"type": "choice", "values": list(_GRIDS)},
            "budgets": {"type": "choice", "values": list(_BUDGETS)},
        },
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


def _training_search(folder: Path, steps: int, count: int, workers: int) -> TuneJob:
    space = {
        "kind": "search_space",
        "name": "seed",
        "job": "bench",
        "parameters": {"seed": {"type": "choice", "values": list(range(count))}},
    }
    return _tune_job(folder, space, _training(folder, steps) | {"scaling": {"num_workers": workers}}, "val/score@64")


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


class _Silent:
    """Ignores progress; see `SearchObserver`."""

    def started(self, key: str, assignment: Assignment) -> None:
        """Ignores the start of a trial."""

    def reported(self, key: str, metrics: Mapping[str, float], steps: int) -> None:
        """Ignores the report of a step."""

    def finished(self, trial: FinishedTrial) -> None:
        """Checks that a trial has succeeded.

        Raises:
            RuntimeError: the trial failed, so its time is not valid.
        """
        if trial.error is not None:
            raise RuntimeError(f"the trial {trial.assignment} failed: {trial.error}")
