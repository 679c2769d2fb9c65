"""A finished evaluation on disk, which is scored from stored predictions without the model and the data."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parcelray.config.benchmark import BenchmarkConfig
from parcelray.datasets.sample import Sample
from parcelray.errors import SystemFailure, UserError
from parcelray.evaluation.passes.store import EvaluatedBenchmark, PredictionStore
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, SplitScores, score_splits
from parcelray.files import read_json, write_json
from parcelray.tracking.run_folder import stored_path

_FILE = "evaluation.json"
_EVALUATE_AGAIN = "run the evaluation again, which computes only missing predictions"


@dataclass(frozen=True)
class Evaluation:
    """One model evaluated on some benchmarks, without the predictions."""

    name: str
    model: str
    """Pinned reference of the checkpoint."""
    digest: str
    """Digest of the weights."""
    budgets: tuple[int, ...]
    """Visual tokens per image, ascending; 0: blind."""
    full: int
    """The largest budget that the model supports, which may be missing in `budgets`."""
    store: str
    """Folder or URI of the stored predictions."""
    benchmarks: tuple[EvaluatedBenchmark, ...]
    mask_decoder: str | None = None
    """The .npz file that the metric `refseg_miou` needs."""

    def save(self, folder: Path) -> None:
        """Writes the evaluation to a folder; the predictions are in the store.

        Files below the storage of the evaluation are stored relative to its folder, so that a project can be moved.
        """
        # The store is `<storage>/predictions`, and the folder is `<storage>/evaluate/NAME`.
        root = Path(self.store).parent
        for benchmark in self.benchmarks:
            benchmark.save(folder)
        data = {
            "name": self.name,
            "model": self.model,
            "digest": self.digest,
            "budgets": list(self.budgets),
            "full": self.full,
            "folder": str(folder.absolute()),
            "store": stored_path(self.store, folder, root),
            "mask_decoder": stored_path(self.mask_decoder, folder, root) if self.mask_decoder else None,
            "benchmarks": [
                {"config": each.config.model_dump(mode="json"), "metric": each.metric} for each in self.benchmarks
            ],
        }
        write_json(folder / _FILE, data)

    def score(self, metrics: Mapping[str, str] = {}, store: PredictionStore | None = None) -> list[SplitScores]:
        """Scores all benchmarks at all budgets.

        Args:
            metrics: by benchmark, a metric that replaces the evaluation's own.
            store: the evaluation's store, if it is already open; None: it is opened here.

        Raises:
            UserError: a metric cannot score the predictions.
            SystemFailure: predictions are missing or damaged.
        """
        known = [benchmark.config.name for benchmark in self.benchmarks]
        unknown = sorted(set(metrics) - set(known))
        if unknown:
            raise UserError(
                f"The evaluation {self.name} has no benchmark {', '.join(unknown)}; it has {', '.join(known)}."
            )
        store = store or PredictionStore(self.store)
        return [
            split
            for benchmark in self.benchmarks
            for split in self._score(benchmark, metrics.get(benchmark.config.name), store)
        ]

    def _score(self, benchmark: EvaluatedBenchmark, metric: str | None, store: PredictionStore) -> list[SplitScores]:
        config, records = benchmark.config, benchmark.records
        if config.unscorable is not None or not records:
            return []
        keys = [key for record in records for key in record.keys.values()]
        found = store.read(config.name, self.digest, keys)
        missing = sum(key not in found for key in keys)
        if missing:
            raise SystemFailure(
                f"{missing} predictions on {config.name} are not in {self.store}; run the evaluation {self.name} again,"
                " which computes only the missing ones."
            )
        answers = {
            budget: [
                GivenAnswer(
                    prediction.text,
                    prediction.cut_off,
                    prediction.num_new_tokens,
                    prediction.mean_log_prob,
                    prediction.entropy,
                )
                for prediction in (found[record.keys[budget]] for record in records)
            ]
            for budget in self.budgets
        }
        rules = ScoringRules(
            metric=metric or benchmark.metric,
            split_of=split_naming(config),
            average_over=config.average_over,
            mask_decoder=Path(self.mask_decoder) if self.mask_decoder else None,
            whole=benchmark.rows == benchmark.fingerprint.rows,
            problems=len(benchmark.problems),
        )
        return score_splits([record.sample for record in records], answers, rules)


def split_naming(config: BenchmarkConfig) -> Callable[[Sample], str]:
    """Returns the function that names the split of a sample: the benchmark, or one part of it."""
    field = config.report_by
    if field is None:
        return lambda sample: config.name
    return lambda sample: f"{config.name}/{getattr(sample, field)}"


def load_evaluation(folder: Path) -> Evaluation:
    """Reads an evaluation that `Evaluation.save` wrote.

    Raises:
        UserError: the folder holds no evaluation.
        SystemFailure: its files are damaged.
    """
    file = folder / _FILE
    data = read_json(file, _EVALUATE_AGAIN)
    if data is None and file.is_file():
        raise SystemFailure(f"{file} is empty; {_EVALUATE_AGAIN}.")
    if data is None:
        raise UserError(
            f"{folder} holds no evaluation (no {_FILE}); give the folder that `parcelray evaluate` wrote, such as"
            " runs/evaluate/NAME."
        )
    names = [each["config"]["name"] for each in data["benchmarks"]]
    mask_decoder = data["mask_decoder"]
    return Evaluation(
        name=data["name"],
        model=data["model"],
        digest=data["digest"],
        budgets=tuple(data["budgets"]),
        full=data["full"],
        store=_located_store(folder, data, names),
        benchmarks=tuple(
            EvaluatedBenchmark.load(folder, BenchmarkConfig.model_validate(each["config"]), each["metric"])
            for each in data["benchmarks"]
        ),
        mask_decoder=os.path.normpath(folder.absolute() / mask_decoder) if mask_decoder else None,
    )


def _located_store(folder: Path, data: Mapping[str, Any], benchmarks: Sequence[str]) -> str:
    """Returns where the predictions of an evaluation are now.

    They are at their place next to the folder, or, if only the folder was moved, where they were. Evaluations of
    earlier versions store an absolute path.
    """
    stored = str(data["store"])
    here = folder.absolute()
    if "://" in stored:
        # `parcelray runs pull` also copies the predictions.
        copied = here / "../.." / "predictions"
        return os.path.normpath(copied) if any((copied / name).is_dir() for name in benchmarks) else stored
    if os.path.isabs(stored):
        places = [Path(stored), here / "../.." / Path(stored).name, here / "../../.." / Path(stored).name]
        order = [*places[1:], places[0]]
    else:
        order = places = [here / stored, Path(data["folder"]) / stored]
    found = next((place for place in order if any((place / name).is_dir() for name in benchmarks)), places[0])
    return os.path.normpath(found)
