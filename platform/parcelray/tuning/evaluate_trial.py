"""Evaluations that differ only in how an image's tokens are made, from one loaded model and one run of the vision tower over all images.

A search asks the same questions of the same model at many splits, counts or reducers. Here the model, the questions and
the patch features are held, so that a point costs the connector or reducer and the decoder. Answers go to the same
store, under the same keys, as those of `parcelray evaluate`.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from parcelray.benchmarks.readers.base import BenchmarkReader, DatasetFingerprint, RowSamples
from parcelray.config.connector import ConnectorConfig
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import set_key, validate
from parcelray.config.search_space import Assignment
from parcelray.datasets.sample import Sample
from parcelray.evaluation.passes.shards import BenchmarkTask, EvaluatedModel, PassSettings
from parcelray.evaluation.passes.worker import Answerer, answer_tasks
from parcelray.evaluation.plan import connector_at
from parcelray.evaluation.predict.predictor import BLIND
from parcelray.evaluation.scoring.aggregate import mean_of, retentions
from parcelray.evaluation.scoring.evaluation import AskedBenchmark, Evaluation
from parcelray.evaluation.scoring.split_scores import Estimate, SplitScores
from parcelray.evaluation.setup import budgets_for, generation_of, prepare
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.processor import image_size_of
from parcelray.models.vlm import config_of, connector_of
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.flops import cost, kv_cache_bytes
from parcelray.profiling.reduction_flops import reduced_prefill_flops

TEXT_TOKENS = 32
"""Of the prompt that costs are given for."""
_LATENCY_REPEATS = 5
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a value, by arithmetic."""
_PER_POINT = (
    "name",
    "budgets",
    "anchor_grid",
    "reducer",
    "need_within",
    "max_unscored",
    "tracking",
    "compute",
    "storage",
)
"""Keys that a point may change without another model or other questions."""


Reference = tuple[Sequence[SplitScores], int]
"""Scores of an uncompressed model on the questions of a search, and its budget."""


class SearchedModel(NamedTuple):
    """A model that points ask."""

    checkpoint: ResolvedCheckpoint
    digest: str
    """Of its content."""


@dataclass(frozen=True)
class EvaluatedPoint:
    """One point of a search, answered and scored."""

    job: EvaluateJob
    budgets: tuple[int, ...]
    """Visual tokens per image; without the blind model."""
    splits: Sequence[SplitScores]
    computed: int
    """Answers that were not there."""


def changed_job(job: EvaluateJob, assignment: Assignment) -> EvaluateJob:
    """A job with the values of a point.

    Raises:
        ConfigError: the job does not take one of them.
    """
    data = job.model_dump(mode="json", exclude_unset=True)
    for key, value in assignment.items():
        set_key(data, key, value, "the search")
    return validate(EvaluateJob, data, "the search")


def prefill_costs(
    checkpoint: Path, connector: ConnectorConfig | None, budget: int, bytes_per_value: int
) -> dict[str, float]:
    """Of one image's prefill: visual tokens, GFLOPs, bytes of the KV cache.

    Args:
        checkpoint: folder of the model.
        connector: what gives the budget; None: nothing that costs.
        budget: visual tokens.
        bytes_per_value: of the KV cache.
    """
    shape = from_transformers_config(config_of(checkpoint))
    flops = cost(shape, connector, budget, num_frames=1, num_text_tokens=TEXT_TOKENS).total
    return {
        "tokens": float(budget),
        "gflops": flops / 1e9,
        "kv_cache_bytes": float(kv_cache_bytes(shape, budget + TEXT_TOKENS, bytes_per_value)),
    }


@dataclass
class WarmEvaluator:
    """Evaluates points of one job, holding what they share; a point that changes the model or the questions loads anew.

    Args:
        job: the evaluation that points change.
        models: its model and those that points name instead, by reference.
        reference: scores of the uncompressed model on the same questions, and their budget; retention is measured
            against them.
        settings: use of this process.
        measure_latency: whether a point's latency is measured, which takes some runs of one image.
    """

    job: EvaluateJob
    models: Mapping[str, SearchedModel]
    reference: Reference
    settings: PassSettings
    measure_latency: bool = False
    _held: dict[str, "_Held"] = field(default_factory=dict, repr=False)

    def metrics(self, assignment: Assignment) -> dict[str, float]:
        """What a search may want of a point: percent for scores and retention, and the cost of one image's prefill.

        Of several budgets, means over them, and scores and retention of each as `score@64`.

        Raises:
            UserError: the point is not legal, or its answers cannot be scored.
        """
        point = self.evaluate(assignment)
        per_budget = [self._at(point, budget) for budget in point.budgets]
        metrics = {
            name: statistics.fmean(each[name] for each in per_budget)
            for name in per_budget[0]
            if all(name in each for each in per_budget)
        }
        if len(point.budgets) > 1:
            metrics |= {
                f"{name}@{budget}": each[name]
                for budget, each in zip(point.budgets, per_budget, strict=True)
                for name in ("score", "retention")
            }
        if self.measure_latency:
            metrics["latency_ms"] = statistics.fmean(self._latency_ms(point, budget) for budget in point.budgets)
        return metrics | {"computed": float(point.computed)}

    def evaluate(self, assignment: Assignment) -> EvaluatedPoint:
        """Answers a point's questions, as far as the store does not have the answers, and scores them."""
        job = changed_job(self.job, assignment)
        held = self._hold(job)
        searched = self._model(job)
        budgets = tuple(budget for budget in budgets_for(job, searched.checkpoint) if budget != BLIND)
        tasks = [
            replace(task, generation=generation_of(job, asked.choice, asked.config))
            for asked, task in zip(held.benchmarks, held.tasks, strict=True)
        ]
        model = replace(held.model, budgets=budgets)
        passes = answer_tasks(tasks, model, held.answerer, settings=self.settings)
        evaluation = Evaluation(
            name=job.name,
            model=model.reference,
            digest=searched.digest,
            budgets=budgets,
            full=max(connector_of(searched.checkpoint.path).supported_budgets),
            store=model.store,
            benchmarks=tuple(
                AskedBenchmark(each.config, passes[each.config.name].asked, each.choice.metric)
                for each in held.benchmarks
            ),
            mask_decoder=job.mask_decoder,
        )
        return EvaluatedPoint(
            job, budgets, evaluation.score(store=held.answerer.store), sum(each.computed for each in passes.values())
        )

    def estimate(self, point: EvaluatedPoint, budget: int, metric: str) -> Estimate:
        """Score or retention, of all or of a family (`score/video`), with its draws: points share the questions, so differences are paired."""
        name, _, family = metric.partition("/")
        splits = [split for split in point.splits if not family or split.family == family]
        if name == "retention":
            return mean_of(list(retentions(splits, budget, *self.reference).values()))
        return mean_of([split.scores[budget].estimate for split in splits if split.scores[budget].estimate.n])

    def _at(self, point: EvaluatedPoint, budget: int) -> dict[str, float]:
        kept = retentions(point.splits, budget, *self.reference)
        scores = {
            split.name: split.scores[budget].estimate for split in point.splits if split.scores[budget].estimate.n
        }
        metrics = {"score": mean_of(list(scores.values())).value}
        overall = mean_of(list(kept.values()))
        metrics |= {"retention": overall.value, "retention_std_error": overall.std_error}
        families: dict[str, list[str]] = {}
        for split in point.splits:
            families.setdefault(split.family, []).append(split.name)
        for family, names in families.items():
            metrics[f"score/{family}"] = mean_of([scores[name] for name in names if name in scores]).value
            metrics[f"retention/{family}"] = mean_of([kept[name] for name in names if name in kept]).value
        return metrics | self.costs(point.job, budget)

    def costs(self, job: EvaluateJob, budget: int) -> dict[str, float]:
        """Of one image's prefill at a budget: visual tokens, GFLOPs, bytes of the KV cache."""
        path = self._model(job).checkpoint.path
        costs = prefill_costs(path, connector_at(job, config_of(path), budget), budget, BYTES[job.dtype])
        if job.reducer is not None:
            costs["gflops"] = (
                reduced_prefill_flops(from_transformers_config(config_of(path)), job.reducer, budget, TEXT_TOKENS) / 1e9
            )
        return costs

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Range of each cost: from nothing to that of all patches without a connector."""
        full = self.reference[1]
        return {
            name: (0.0, value)
            for name, value in prefill_costs(
                self._model(self.job).checkpoint.path, None, full, BYTES[self.job.dtype]
            ).items()
        }

    def _model(self, job: EvaluateJob) -> SearchedModel:
        return self.models[job.model.reference]

    def _latency_ms(self, point: EvaluatedPoint, budget: int) -> float:
        """Time from one image to the first token of its answer, milliseconds: the median of a few runs, nothing held."""
        held = self._hold(point.job)
        task = held.tasks[0]
        sample: Sample = next(sample for row in task.rows for sample in task.reader.read(row).samples if sample.images)
        generation = replace(
            generation_of(point.job, held.benchmarks[0].choice, held.benchmarks[0].config),
            max_new_tokens=1,
            decoding="greedy",
            num_beams=1,
        )
        predictor = held.answerer.predictor(generation).without_features()
        times = []
        for repeat in range(_LATENCY_REPEATS + 1):
            started = time.perf_counter()
            predictor.answer_budgets([sample], [budget])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times)

    def _hold(self, job: EvaluateJob) -> "_Held":
        key = json.dumps(job.model_dump(mode="json", exclude=set(_PER_POINT)), sort_keys=True)
        if key not in self._held:
            # One at a time: what is held is a model and all its features.
            self._held.clear()
            self._held[key] = _Held(job, self._model(job), self.settings)
        return self._held[key]


class _Held:
    """The model and the questions of points that share them."""

    def __init__(self, job: EvaluateJob, searched: SearchedModel, settings: PassSettings) -> None:
        checkpoint, digest = searched
        store = job.storage if "://" in job.storage else str(Path(job.storage).absolute())
        self.model = EvaluatedModel(checkpoint.path, checkpoint.pinned, digest, (), f"{store}/predictions")
        self.benchmarks = prepare(job, image_size_of(checkpoint.path))
        self.tasks: list[BenchmarkTask] = [
            replace(each.task, reader=_HeldReader(each.task.reader)) for each in self.benchmarks
        ]
        self.answerer = Answerer(self.model, settings, job.dtype, keep=True)


class _HeldReader:
    """A reader that reads every row once."""

    def __init__(self, reader: BenchmarkReader) -> None:
        self._reader = reader
        self._rows: dict[int, RowSamples] = {}
        self._pin: DatasetFingerprint | None = None

    @property
    def name(self) -> str:
        return self._reader.name

    def fingerprint(self) -> DatasetFingerprint:
        self._pin = self._pin or self._reader.fingerprint()
        return self._pin

    def order(self) -> Sequence[int]:
        return self._reader.order()

    def cluster(self, row: int) -> str:
        return self._reader.cluster(row)

    def read(self, row: int) -> RowSamples:
        if row not in self._rows:
            self._rows[row] = self._reader.read(row)
        return self._rows[row]
