"""A finished evaluation on disk: what was asked of which model, from which everything is scored again without the model and the data."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parcelray.config.benchmark import BenchmarkConfig
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.passes.records import Asked, read_asked, write_asked
from parcelray.evaluation.passes.store import PredictionStore
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, SplitScores, score_splits

_FILE = "evaluation.json"


@dataclass(frozen=True)
class AskedBenchmark:
    """One benchmark of an evaluation."""

    config: BenchmarkConfig
    asked: Asked
    metric: str | None = None
    """Instead of its own."""


@dataclass(frozen=True)
class Evaluation:
    """Which model was asked what."""

    name: str
    model: str
    """The checkpoint, pinned."""
    digest: str
    """Of its weights."""
    budgets: tuple[int, ...]
    """Visual tokens per image, ascending; 0: blind."""
    full: int
    """The largest budget that the model can give; not always among the budgets."""
    store: str
    """Where the answers are."""
    benchmarks: tuple[AskedBenchmark, ...]
    mask_decoder: str | None = None

    def save(self, folder: Path) -> None:
        """Writes everything but the answers, which are in the store."""
        folder.mkdir(parents=True, exist_ok=True)
        for benchmark in self.benchmarks:
            write_asked(benchmark.asked, folder / "asked" / benchmark.config.name)
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
            metrics: by benchmark, a metric instead of the evaluation's own.
            store: the evaluation's, opened before; None: it is opened here.

        Raises:
            UserError: answers are missing, or a metric cannot score them.
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

    def _score(self, benchmark: AskedBenchmark, metric: str | None, store: PredictionStore) -> list[SplitScores]:
        config, asked = benchmark.config, benchmark.asked
        if config.unscorable is not None or not asked.records:
            return []
        found = store.read(config.name, self.digest, (key for record in asked.records for key in record.keys.values()))
        missing = sum(key not in found for record in asked.records for key in record.keys.values())
        if missing:
            raise UserError(
                f"{missing} answers on {config.name} are not in {self.store}; run the evaluation {self.name} again, and"
                " only they are computed."
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
                for prediction in (found[record.keys[budget]] for record in asked.records)
            ]
            for budget in self.budgets
        }
        rules = ScoringRules(
            metric=metric or benchmark.metric,
            split_of=split_naming(config),
            average_over=config.average_over,
            mask_decoder=Path(self.mask_decoder) if self.mask_decoder else None,
            whole=asked.rows == asked.pin.rows,
            problems=len(asked.problems),
        )
        return score_splits([record.sample for record in asked.records], answers, rules)


def split_naming(config: BenchmarkConfig) -> Callable[[Sample], str]:
    """How the samples of a benchmark are told apart in its results."""
    field = config.report_by
    if field is None:
        return lambda sample: config.name
    return lambda sample: f"{config.name}/{getattr(sample, field)}"


def load_evaluation(folder: Path) -> Evaluation:
    """Reads an evaluation.

    Raises:
        UserError: the folder holds none.
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
        benchmarks=tuple(_benchmark(folder, each) for each in data["benchmarks"]),
        mask_decoder=data["mask_decoder"],
    )


def _benchmark(folder: Path, data: dict[str, Any]) -> AskedBenchmark:
    config = BenchmarkConfig.model_validate(data["config"])
    asked = read_asked(folder / "asked" / config.name)
    if asked is None:
        raise UserError(f"{folder} lacks what was asked of {config.name}; run the evaluation again.")
    return AskedBenchmark(config, asked, data["metric"])
