"""An evaluation job made ready: its models pinned, its budgets as numbers, its benchmarks open."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parcelray.benchmarks.catalog import catalog, find
from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.open import open_reader
from parcelray.benchmarks.readers.base import BenchmarkReader, chosen_rows
from parcelray.config.benchmark import BenchmarkConfig
from parcelray.config.evaluate import BenchmarkChoice, EvaluateJob
from parcelray.config.loader import validate
from parcelray.config.model import CheckpointModelConfig
from parcelray.errors import UnsupportedBudgetError
from parcelray.evaluation.passes.shards import BenchmarkTask
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import BLIND
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.token_reduction import build_reducer
from parcelray.models.token_reduction.base import check_uncompressed
from parcelray.models.vlm import config_of, connector_of


@dataclass(frozen=True)
class PreparedBenchmark:
    """A benchmark that is ready to be asked."""

    choice: BenchmarkChoice
    config: BenchmarkConfig
    task: BenchmarkTask


def pinned_job(job: EvaluateJob, checkpoint: ResolvedCheckpoint, reference: ResolvedCheckpoint | None) -> EvaluateJob:
    """The job with its models pinned: an alias that moved is another evaluation."""
    changes: dict[str, Any] = {"model": CheckpointModelConfig(reference=checkpoint.pinned)}
    if reference is not None:
        changes["reference"] = CheckpointModelConfig(reference=reference.pinned)
    return job.model_copy(update=changes)


def budgets_for(job: EvaluateJob, checkpoint: ResolvedCheckpoint) -> tuple[int, ...]:
    """The job's budgets as numbers, ascending.

    Raises:
        UnsupportedBudgetError: the checkpoint's connector cannot give one.
    """
    connector = connector_of(checkpoint.path)
    full = max(connector.supported_budgets)
    if job.reducer is not None:
        reducer = build_reducer(job.reducer)
        check_uncompressed(connector)
        legal, name = reducer.budgets_of(full, config_of(checkpoint.path).depths), reducer.name
    else:
        legal, name = connector.supported_budgets, connector.name
    numbers = {BLIND if budget == "blind" else full if budget == "full" else budget for budget in job.budgets}
    for number in sorted(numbers - {BLIND}):
        if job.anchor_grid is not None:
            connector.check_split(number, job.anchor_grid)
        elif number not in legal:
            raise UnsupportedBudgetError(number, legal, name)
    return tuple(sorted(numbers))


def prepare(job: EvaluateJob, image_size: int) -> list[PreparedBenchmark]:
    """Opens the benchmarks of a job.

    Args:
        job: the evaluation.
        image_size: side of the images that procedural benchmarks draw, pixels.

    Raises:
        UserError: a benchmark or metric is unknown, or its data are not there.
    """
    known = catalog([Path(path) for path in job.catalog])
    prepared = []
    for choice in job.benchmarks:
        config = _with_source(find(choice.name, known), choice)
        if choice.metric is not None:
            metric(choice.metric)
        reader = open_reader(
            config,
            family=job.prompt_family,
            data=Path(choice.data) if choice.data is not None else None,
            image_size=image_size,
        )
        prepared.append(
            PreparedBenchmark(
                choice,
                config,
                BenchmarkTask(reader, _rows(reader, choice, job.seed), generation_of(job, choice, config)),
            )
        )
    return prepared


def generation_of(job: EvaluateJob, choice: BenchmarkChoice, config: BenchmarkConfig) -> GenerationSettings:
    """How a benchmark's answers are made."""
    return GenerationSettings(
        max_new_tokens=choice.max_new_tokens or config.longest_answer(job.prompt_family),
        dtype=job.dtype,
        decoding=choice.decoding or config.decoding,
        num_beams=config.num_beams if choice.decoding is None else 1,
        reducer=job.reducer.model_dump_json() if job.reducer is not None else None,
        anchor_grid=job.anchor_grid,
    )


def _with_source(config: BenchmarkConfig, choice: BenchmarkChoice) -> BenchmarkConfig:
    if not choice.source:
        return config
    data = config.model_dump(mode="json")
    return validate(
        BenchmarkConfig, data | {"source": data["source"] | choice.source}, f"benchmark {config.name} of the job"
    )


def _rows(reader: BenchmarkReader, choice: BenchmarkChoice, seed: int) -> Sequence[int]:
    return list(chosen_rows(reader, choice.limit, seed))
