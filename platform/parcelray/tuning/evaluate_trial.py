"""Evaluations of many points of a search with one loaded model and one pass of the vision tower over all images.

A search evaluates the same model on the same samples at many splits, budgets or reducers. The model, the samples and
the patch features are kept, so a point costs only the connector or reducer and the decoder. Predictions go to the
same store, under the same keys, as those of `parcelray evaluate`.
"""

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from parcelray.benchmarks.readers.base import BenchmarkReader, DatasetFingerprint, RowSamples
from parcelray.config.connector import ConnectorConfig
from parcelray.config.evaluate import BLIND, EvaluateJob
from parcelray.config.loader import changed
from parcelray.config.search_space import Assignment
from parcelray.datasets.sample import Sample
from parcelray.evaluation.passes.worker import ModelWorker
from parcelray.evaluation.plan import budgets_for, connector_at, evaluated_model, generation_of, prepare
from parcelray.evaluation.run import evaluate_model
from parcelray.evaluation.scoring.aggregate import retentions
from parcelray.evaluation.scoring.estimate import Estimate, mean_of
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.vlm import config_of, image_size_of
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.flops import cost, kv_cache_bytes
from parcelray.profiling.reduction_flops import reduced_prefill_flops
from parcelray.tracking.opening import model_folder

TEXT_TOKENS = 32
"""Tokens of the prompt for which costs are given."""
_LATENCY_REPEATS = 5
"""Number of timed runs of a latency measurement."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one value, by data type."""
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
"""Keys of the job that a point may change while the model and the samples stay the same."""


Reference = tuple[Sequence[SplitScores], int]
"""Scores of an uncompressed model on the samples of a search, and its budget."""


@dataclass(frozen=True)
class EvaluatedPoint:
    """The evaluation of one point of a search."""

    job: EvaluateJob
    budgets: tuple[int, ...]
    """Budgets in visual tokens per image, without `blind`."""
    splits: Sequence[SplitScores]
    computed: int
    """Number of new predictions; the others were in the store."""


def prefill_costs(
    checkpoint: Path, connector: ConnectorConfig | None, budget: int, bytes_per_value: int
) -> dict[str, float]:
    """Returns the costs of the prefill of one image: visual tokens, GFLOPs, and bytes of the KV cache.

    Args:
        checkpoint: folder of the model.
        connector: the connector that produces the visual tokens; None: none, so nothing is added for it.
        budget: visual tokens.
        bytes_per_value: bytes of one value in the KV cache.
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
    """Evaluates points of one job, and keeps the model and the samples until a point changes one of them.

    Args:
        job: the evaluation that points change.
        models: its model and those that points name instead, by reference.
        reference: scores of the uncompressed model on the same questions, and their budget; retention is measured
            against them.
        measure_latency: whether a point's latency is measured, which takes some runs of one image.
        folder: see the attribute.
    """

    job: EvaluateJob
    models: Mapping[str, ResolvedCheckpoint]
    reference: Reference
    measure_latency: bool = False
    folder: str = field(default_factory=os.getcwd)
    """Folder that relative paths among the values of a point are relative to: the driver's working folder."""
    _held: dict[str, "_Held"] = field(default_factory=dict, repr=False)
    _opened: dict[str, ResolvedCheckpoint] = field(default_factory=dict, repr=False)

    def metrics(self, assignment: Assignment) -> dict[str, float]:
        """Returns the metrics of a point: scores and retention in percent, and the costs of the prefill of one image.

        With several budgets, these are means over the budgets, plus score and retention of each, such as `score@64`.

        Raises:
            UserError: the point is not legal, or its predictions cannot be scored.
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
        """Evaluates a point; predictions that are in the store are reused."""
        job = changed(self.job, assignment, "the search", folder=self.folder)
        held = self._hold(job)
        budgets = tuple(budget for budget in budgets_for(job, self._model(job)) if budget != BLIND)
        benchmarks = [
            replace(each, generation=generation_of(job, each.choice, each.config)) for each in held.benchmarks
        ]
        evaluation, result = evaluate_model(
            job.name,
            replace(held.model, budgets=budgets),
            benchmarks,
            job.compute,
            mask_decoder=job.mask_decoder,
            worker=held.worker,
        )
        return EvaluatedPoint(job, budgets, evaluation.score(store=held.worker.store), result.computed)

    def estimate(self, point: EvaluatedPoint, budget: int, metric: str) -> Estimate:
        """Returns the score or retention of a point, of all families or one (`score/video`), with joint draws.

        All points have the same samples and draws, so differences between them are paired.
        """
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
        """Returns the costs of the prefill of one image at a budget (see `prefill_costs`)."""
        path = self._model(job).path
        costs = prefill_costs(path, connector_at(job, config_of(path), budget), budget, BYTES[job.dtype])
        if job.reducer is not None:
            costs["gflops"] = (
                reduced_prefill_flops(from_transformers_config(config_of(path)), job.reducer, budget, TEXT_TOKENS) / 1e9
            )
        return costs

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Returns the range of each cost: from 0 to the cost of all patches without a connector."""
        full = self.reference[1]
        return {
            name: (0.0, value)
            for name, value in prefill_costs(self._model(self.job).path, None, full, BYTES[self.job.dtype]).items()
        }

    def _model(self, job: EvaluateJob) -> ResolvedCheckpoint:
        """Returns a job's model with its folder on this host."""
        reference = job.model.reference
        if reference not in self._opened:
            checkpoint = self.models[reference]
            self._opened[reference] = checkpoint._replace(path=model_folder(checkpoint.pin))
        return self._opened[reference]

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a trial on another host needs: not what was opened and loaded on this one."""
        return {**self.__dict__, "_opened": {}, "_held": {}}

    def _latency_ms(self, point: EvaluatedPoint, budget: int) -> float:
        """Measures the time from an image to the first token, milliseconds: the median of a few runs without cache."""
        held = self._hold(point.job)
        first = held.benchmarks[0]
        sample: Sample = next(each for row in first.rows for each in first.reader.read(row).samples if each.images)
        generation = replace(
            generation_of(point.job, first.choice, first.config),
            max_new_tokens=1,
            decoding="greedy",
            num_beams=1,
        )
        predictor = held.worker.predictor(generation).without_features()
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
            # Only one is kept, because it holds a model and all patch features.
            self._held.clear()
            self._held[key] = _Held(job, self._model(job))
        return self._held[key]


class _Held:
    """The model and the samples that several points share."""

    def __init__(self, job: EvaluateJob, checkpoint: ResolvedCheckpoint) -> None:
        self.model = evaluated_model(checkpoint, (), job.storage)
        self.benchmarks = [
            replace(each, reader=_HeldReader(each.reader)) for each in prepare(job, image_size_of(checkpoint.path))
        ]
        self.worker = ModelWorker(self.model, job.compute, job.dtype, keep=True)


class _HeldReader:
    """A reader that reads every row only once and keeps it."""

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
