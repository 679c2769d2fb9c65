"""Evaluates shards with a model at every budget and stores the predictions, in a Ray actor or in this process."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch

from parcelray.benchmarks.readers.base import Problem
from parcelray.config.evaluate import PassConfig
from parcelray.evaluation.passes.shards import (
    EvaluatedModel,
    OnProgress,
    PassResult,
    PreparedBenchmark,
    ShardInput,
    ShardResult,
    collect,
    make_shards,
    read_shard,
    stored_keys,
)
from parcelray.evaluation.passes.store import Prediction, PredictionStore, SampleRecord
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Answer, EncodedImages, Predictor
from parcelray.models.allocator import keep_freed_memory
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.feature_cache import FeatureCache
from parcelray.models.vlm import load_processor, load_vlm, use_sdpa_where_exact
from parcelray.tracking.opening import model_folder

OnStage = Callable[[str], None]
"""Called with a description of the stage that begins; it is shown if the pass stalls."""


def run_in_process(
    benchmarks: Sequence[PreparedBenchmark],
    model: EvaluatedModel,
    worker: "ModelWorker",
    settings: PassConfig,
    on_progress: OnProgress,
) -> PassResult:
    """Runs a pass in this process, one shard after the other.

    Args:
        benchmarks: the benchmarks to evaluate.
        model: the model to evaluate.
        worker: holds the model; it may have served earlier passes with the same weights.
        settings: only `rows_per_shard` is used here.
        on_progress: called after each shard.
    """
    present = stored_keys(benchmarks, model, worker.store)

    def finished() -> Iterator[ShardResult]:
        for shard in make_shards(benchmarks, settings.rows_per_shard):
            yield worker.evaluate(read_shard(shard, benchmarks[shard.benchmark], model, present[shard.benchmark]))

    return collect(benchmarks, finished(), on_progress)


class ModelWorker:
    """Evaluates shards with one model, which is loaded when the first prediction is missing.

    Args:
        model: what to evaluate, and where to store predictions.
        settings: of the pass.
        dtype: dtype of the model, by its torch name.
        keep: whether to keep patch features (up to `settings.feature_cache_gb`) and stored predictions in memory for
            the next pass.
    """

    def __init__(self, model: EvaluatedModel, settings: PassConfig, dtype: str, *, keep: bool = False) -> None:
        self.store = PredictionStore(model.store, keep=keep)
        self._model = model
        self._settings = settings
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._features = FeatureCache[EncodedImages](int(settings.feature_cache_gb * 2**30)) if keep else None
        self._predictors: dict[GenerationSettings, Predictor] = {}
        self._folder: Path | None = None

    def evaluate(self, read: ShardInput, on_stage: OnStage = lambda stage: None) -> ShardResult:
        """Computes the missing predictions of a shard and stores them."""
        unreadable: dict[str, str] = {}
        computed = 0
        # Usually every budget lacks the same samples; such budgets share one encoding of the images.
        for budgets, indices in _budgets_by_samples(read.missing):
            samples = [read.samples[index] for index in indices]
            on_stage(
                f"evaluating samples {samples[0].id} to {samples[-1].id} of {read.benchmark} at"
                f" {', '.join(map(str, budgets))} visual tokens"
            )
            answers = self.predictor(read.generation, on_stage).answer_budgets(samples, budgets)
            predictions = [
                self._prediction(read, read.records[index], budget, answer)
                for budget in budgets
                for index, answer in zip(indices, answers[budget], strict=True)
                if not answer.problem
            ]
            unreadable |= {
                sample.id: answer.problem
                for budget in budgets
                for sample, answer in zip(samples, answers[budget], strict=True)
                if answer.problem
            }
            on_stage(f"storing {len(predictions)} predictions on {read.benchmark}")
            self.store.write(predictions)
            computed += len(predictions)
        return ShardResult(
            shard=read.shard,
            records=[record for record in read.records if record.sample.id not in unreadable],
            problems=[*read.problems, *(Problem(name, reason) for name, reason in unreadable.items())],
            computed=computed,
            present=len(read.records) * len(read.missing) - sum(map(len, read.missing.values())),
        )

    def _prediction(self, read: ShardInput, record: SampleRecord, budget: int, answer: Answer) -> Prediction:
        return Prediction(
            key=record.keys[budget],
            benchmark=read.benchmark,
            sample_id=record.sample.id,
            model=self._model.digest,
            num_visual_tokens=budget,
            settings=read.generation.to_json(),
            text=answer.text,
            num_new_tokens=answer.num_new_tokens,
            cut_off=answer.cut_off,
            mean_log_prob=answer.confidence.mean_log_prob,
            entropy=answer.confidence.entropy,
        )

    def predictor(self, generation: GenerationSettings, on_stage: OnStage = lambda stage: None) -> Predictor:
        """Returns the predictor for some generation settings; all predictors share the model."""
        if generation not in self._predictors:
            if self._folder is None:
                self._folder = model_folder(self._model.pin, on_stage)
            on_stage(f"loading {self._folder}")
            model, device = self._loaded
            self._predictors[generation] = Predictor(
                model,
                self._processor,
                batch_size=self._settings.batch_size,
                settings=generation,
                device=device,
                features=self._features,
            )
        return self._predictors[generation]

    @cached_property
    def _loaded(self) -> tuple[ElasticVLM, str]:
        device = "cuda" if self._settings.gpus_per_actor and torch.cuda.is_available() else "cpu"
        if device == "cpu":
            keep_freed_memory()
            # Ray gives a worker as many threads as its `num_cpus`, but that number is only a share for scheduling.
            torch.set_num_threads(
                self._settings.threads_per_actor or max(1, (os.cpu_count() or 1) // max(1, self._settings.actors))
            )
        assert self._folder is not None, "`predictor` opens the checkpoint first"
        model = load_vlm(self._folder, dtype=self._dtype).eval().to(device)
        use_sdpa_where_exact(model)
        return model, device

    @cached_property
    def _processor(self) -> ElasticProcessor:
        assert self._folder is not None, "`predictor` opens the checkpoint first"
        processor: ElasticProcessor = load_processor(self._folder)
        return processor


def _budgets_by_samples(missing: dict[int, list[int]]) -> list[tuple[list[int], list[int]]]:
    """Groups the budgets that lack the same samples: pairs of budgets and sample indices."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for budget, indices in missing.items():
        if indices:
            groups.setdefault(tuple(indices), []).append(budget)
    return [(budgets, list(indices)) for indices, budgets in groups.items()]
