"""A finished evaluation on disk, which is scored from stored predictions without the model and the data."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from parcelray.config.benchmark import BenchmarkConfig
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.passes.store import EvaluatedBenchmark, PredictionStore
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, SplitScores, score_splits

_FILE = "evaluation.json"


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
        """Writes the evaluation to a folder; the predictions are in the store."""
        folder.mkdir(parents=True, exist_ok=True)
        for benchmark in self.benchmarks:
            benchmark.save(folder)
        data = {
            "name": self.name,
            "model": self.model,
            "digest": self.digest,
            "budgets": list(self.budgets),
            "full": self.full,
            "store": self.store,
            "mask_decoder": self.mask_decoder,
            "benchmarks": [
                {"config": each.config.model_dump(mode="json"), "metric": each.metric} for each in self.benchmarks
            ],
        }
        (folder / _FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def score(self, metrics: Mapping[str, str] = {}, store: PredictionStore | None = None) -> list[SplitScores]:
        """Scores all benchmarks at all budgets.

        Args:
            metrics: by benchmark, a metric that replaces the evaluation's own.
            store: the evaluation's store, if it is already open; None: it is opened here.

        Raises:
            UserError: predictions are missing, or a metric cannot score them.
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
            raise UserError(
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
    """
    file = folder / _FILE
    if not file.is_file():
        raise UserError(
            f"{folder} holds no evaluation (no {_FILE}); give the folder that `parcelray evaluate` wrote, such as"
            " runs/evaluate/NAME."
        )
    data = json.loads(file.read_text(encoding="utf-8"))
    return Evaluation(
        name=data["name"],
        model=data["model"],
        digest=data["digest"],
        budgets=tuple(data["budgets"]),
        full=data["full"],
        store=data["store"],
        benchmarks=tuple(
            EvaluatedBenchmark.load(folder, BenchmarkConfig.model_validate(each["config"]), each["metric"])
            for each in data["benchmarks"]
        ),
        mask_decoder=data["mask_decoder"],
    )
