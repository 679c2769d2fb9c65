"""The model's part of a pass: bundles answered at every budget and stored, in a Ray actor or in this process."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from parcelray.benchmarks.readers.base import Problem
from parcelray.errors import UserError
from parcelray.evaluation.passes.records import Record
from parcelray.evaluation.passes.shards import (
    DEFAULT_PASS,
    BenchmarkPass,
    BenchmarkTask,
    Done,
    EvaluatedModel,
    PassSettings,
    Work,
    collect,
    dtype_of,
    make_bundles,
    read_bundle,
    stored_keys,
)
from parcelray.evaluation.passes.store import Prediction, PredictionStore
from parcelray.evaluation.predict.feature_cache import FeatureCache
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Answer, Predictor
from parcelray.models.allocator import keep_freed_memory
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.vlm import load_processor, load_vlm, use_sdpa_where_exact

Stage = Callable[[str], None]
"""Is told what begins, for the message of a pass that hangs."""


def run_pass_in_process(
    tasks: Sequence[BenchmarkTask],
    model: EvaluatedModel,
    *,
    settings: PassSettings = DEFAULT_PASS,
    on_progress: Callable[[str, int, int], None] = lambda benchmark, rows, total: None,
) -> dict[str, BenchmarkPass]:
    """The pass in this process, one bundle after the other, with its threads unless a number is set; see `evaluate.run_pass`."""
    settings = replace(settings, threads_per_actor=settings.threads_per_actor or torch.get_num_threads())
    return answer_tasks(
        tasks, model, Answerer(model, settings, dtype_of(tasks)), settings=settings, on_progress=on_progress
    )


def answer_tasks(
    tasks: Sequence[BenchmarkTask],
    model: EvaluatedModel,
    answerer: "Answerer",
    *,
    settings: PassSettings = DEFAULT_PASS,
    on_progress: Callable[[str, int, int], None] = lambda benchmark, rows, total: None,
) -> dict[str, BenchmarkPass]:
    """A pass with an answerer that may have answered other passes of the same model before."""
    present = stored_keys(tasks, model, answerer.store)

    def finished() -> Iterator[Done]:
        for bundle in make_bundles(tasks, settings.rows_per_bundle):
            task = tasks[bundle.task]
            yield answerer.answer(
                read_bundle(task.reader, task.generation, bundle, model, present[bundle.task]),
                task.reader.name,
                task.generation,
            )

    return collect(tasks, finished(), on_progress)


class Answerer:
    """Holds the model, from the first bundle that needs it on.

    Args:
        model: what answers, and where answers are stored.
        settings: of the pass.
        dtype: arithmetic of the model, as torch names it.
        keep: whether to hold patch features (as `settings.feature_cache_gb` allows) and stored answers for the next
            pass.
    """

    def __init__(self, model: EvaluatedModel, settings: PassSettings, dtype: str, *, keep: bool = False) -> None:
        self.store = PredictionStore(model.store, keep=keep)
        self._model = model
        self._settings = settings
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._features = FeatureCache(int(settings.feature_cache_gb * 2**30)) if keep else None
        self._predictors: dict[GenerationSettings, Predictor] = {}

    def answer(
        self, work: Work, benchmark: str, generation: GenerationSettings, begin: Stage = lambda stage: None
    ) -> Done:
        """Answers what is missing of a bundle of a benchmark and stores it."""
        unreadable: dict[str, str] = {}
        computed = 0
        # Mostly every budget lacks the same samples; budgets that do share one encoding of their images.
        for budgets, places in _alike(work.missing):
            samples = [work.samples[place] for place in places]
            begin(
                f"answering samples {samples[0].id} to {samples[-1].id} of {benchmark} at"
                f" {', '.join(map(str, budgets))} visual tokens"
            )
            answers = self.predictor(generation, begin).answer_budgets(samples, budgets)
            found = [
                self._prediction(benchmark, generation, work.records[place], budget, answer)
                for budget in budgets
                for place, answer in zip(places, answers[budget], strict=True)
                if not answer.problem
            ]
            unreadable |= {
                sample.id: answer.problem
                for sample, answer in zip(samples, answers[budgets[0]], strict=True)
                if answer.problem
            }
            begin(f"storing {len(found)} answers on {benchmark}")
            self.store.write(found)
            computed += len(found)
        records = [each for each in work.records if each.sample.id not in unreadable]
        problems = [*work.problems, *(Problem(name, reason) for name, reason in unreadable.items())]
        present = len(work.records) * len(work.missing) - sum(map(len, work.missing.values()))
        return Done(work.bundle, records, problems, computed, present)

    def _prediction(
        self, benchmark: str, generation: GenerationSettings, asked: Record, budget: int, answer: Answer
    ) -> Prediction:
        return Prediction(
            key=asked.keys[budget],
            benchmark=benchmark,
            sample_id=asked.sample.id,
            model=self._model.digest,
            num_visual_tokens=budget,
            settings=generation.to_json(),
            text=answer.text,
            num_new_tokens=answer.num_new_tokens,
            cut_off=answer.cut_off,
            mean_log_prob=answer.confidence.mean_log_prob,
            entropy=answer.confidence.entropy,
        )

    def predictor(self, generation: GenerationSettings, begin: Stage = lambda stage: None) -> Predictor:
        """The model, answering in a certain way."""
        if generation not in self._predictors:
            begin(f"loading {self._model.folder}")
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
            # Ray gives a worker as many threads as it has CPUs, and those of an actor are a share for scheduling.
            torch.set_num_threads(
                self._settings.threads_per_actor or max(1, (os.cpu_count() or 1) // max(1, self._settings.actors))
            )
        model = load_vlm(self._folder, dtype=self._dtype).eval().to(device)
        use_sdpa_where_exact(model)
        return model, device

    @cached_property
    def _folder(self) -> Path:
        """The checkpoint on this node; one of the hub is fetched once a node, into the shared cache."""
        folder = self._model.folder
        if folder.is_dir():
            return folder
        if not self._model.reference.startswith("hf:"):
            raise UserError(
                f"{folder} is not on the node {os.uname().nodename}; keep checkpoints on storage that all nodes see, or"
                " on the hub."
            )
        return resolve_checkpoint(self._model.reference).path

    @cached_property
    def _processor(self) -> ElasticProcessor:
        processor: ElasticProcessor = load_processor(self._folder)
        return processor


def _alike(missing: dict[int, list[int]]) -> list[tuple[list[int], list[int]]]:
    """Budgets that lack the same samples, and which."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for budget, places in missing.items():
        if places:
            groups.setdefault(tuple(places), []).append(budget)
    return [(budgets, list(places)) for places, budgets in groups.items()]
