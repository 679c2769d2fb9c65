"""Prepares an evaluation: pins its models, resolves its budgets, opens its benchmarks, and estimates its cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parcelray.benchmarks.catalog import catalog, find
from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.open import open_reader
from parcelray.benchmarks.readers.base import chosen_rows
from parcelray.config.benchmark import BenchmarkConfig
from parcelray.config.connector import ConnectorConfig, ParcelConnectorConfig, RouteConfig
from parcelray.config.evaluate import BLIND, BenchmarkChoice, EvaluateJob, budget_name
from parcelray.config.identity import identity
from parcelray.config.loader import validate
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.reducer import ToMeConfig
from parcelray.errors import UnsupportedBudgetError
from parcelray.evaluation.passes.shards import EvaluatedModel, PreparedBenchmark
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.token_reduction import build_reducer
from parcelray.models.token_reduction.base import check_uncompressed
from parcelray.models.vlm import ElasticConfig, config_of, connector_of, family_of, image_size_of
from parcelray.profiling.backbone_shapes import BackboneShape, from_transformers_config
from parcelray.profiling.flops import cost
from parcelray.profiling.machine import matmul_flops_per_second
from parcelray.profiling.reduction_flops import reduced_cost
from parcelray.tracking.model_versions import referenced_version
from parcelray.tracking.registry import resolve_model
from parcelray.tracking.store import ensure_store

if TYPE_CHECKING:
    from rich.table import Table

_TEXT_TOKENS = 32
"""Length of the prompt that costs are estimated for, tokens."""


@dataclass(frozen=True)
class EvaluationPlan:
    """A resolved evaluation with its estimated cost."""

    identity: str
    model: str
    budgets: tuple[int, ...]
    rows: dict[str, int]
    """Number of rows, by benchmark."""
    questions: int
    """Number of samples, estimated from the first row of each benchmark."""
    answers: int
    """Number of predictions: samples times budgets."""
    flops: int
    """FLOPs of the vision tower once per image, and of connector or reducer and prefill at each budget.

    Decoding is not counted.
    """
    seconds: float
    """Lower bound of the time, from the speed of matrix products measured on this machine."""
    warnings: tuple[str, ...]
    """See `family_warnings`."""
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON-serialisable values."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__}

    def to_rich(self) -> "Table":
        """Returns the plan as a table for the console."""
        from rich.table import Table

        table = Table("plan", self.identity, show_lines=False)
        rows = {
            "model": self.model,
            "visual-token budgets": ", ".join(budget_name(budget) for budget in self.budgets),
            "rows": ", ".join(f"{name} {count:,}" for name, count in self.rows.items()),
            "predictions": (
                f"about {self.answers:,} ({self.questions:,} samples at {len(self.budgets)} budgets); stored"
                " predictions are reused"
            ),
            "compute": f"{self.flops / 1e12:,.2f} TFLOP, without decoding",
            "time": f"at least {self.seconds / 60:,.1f} min at the speed of this machine's matrix products",
        }
        for key, value in [*rows.items(), *(("warning", warning) for warning in self.warnings)]:
            table.add_row(key, value)
        return table


def as_promoted(job: EvaluateJob) -> tuple[EvaluateJob, str | None]:
    """Adds the reducer that a registered version was promoted with to a job without the key `reducer`.

    Returns:
        The job, with a reference to the version, and a sentence about it; the same job and None if nothing is added.

    Raises:
        UserError: there is no such version.
    """
    if "reducer" in job.model_fields_set or job.tracking.uri is None or not job.model.reference.startswith("models:/"):
        return job, None
    version = referenced_version(ensure_store(job.tracking.uri), job.model.reference)
    if version is None or version.reducer is None:
        return job, None
    name = f"models:/{version.name}/{version.version}"
    changes = {"model": job.model.model_copy(update={"reference": name}), "reducer": version.reducer}
    return job.model_copy(update=changes), (
        f"{name} is evaluated with the reducer {version.reducer.type}, which it was promoted with; set reducer to"
        " another one, or to null for none."
    )


def evaluation_plan(job: EvaluateJob) -> EvaluationPlan:
    """Resolves a job, checks that its parts fit together, and estimates its cost.

    Raises:
        UserError: a model, benchmark or data set does not exist, or the connector does not support a budget.
    """
    checkpoint = resolve_model(job.model, job.tracking.uri)
    reference = resolve_model(job.reference, job.tracking.uri) if job.reference is not None else None
    budgets = budgets_for(job, checkpoint)
    benchmarks = prepare(job, image_size_of(checkpoint.path))
    config = config_of(checkpoint.path)
    shape = from_transformers_config(config)
    questions = flops = 0
    for benchmark in benchmarks:
        first = benchmark.reader.read(benchmark.rows[0]).samples
        count = len(benchmark.rows) * max(1, len(first))
        images = len(first[0].images) if first else 1
        questions += count
        numbers = [budget for budget in budgets if budget != BLIND]
        if numbers:
            flops += len(benchmark.rows) * cost(shape, None, shape.num_patches, images, _TEXT_TOKENS).vision_encoder
            flops += count * sum(_sample_flops(job, config, shape, budget, images) for budget in numbers)
    return EvaluationPlan(
        identity=identity(pinned_job(job, checkpoint, reference)),
        model=checkpoint.pinned,
        budgets=budgets,
        rows={benchmark.config.name: len(benchmark.rows) for benchmark in benchmarks},
        questions=questions,
        answers=questions * len(budgets),
        flops=flops,
        seconds=flops / matmul_flops_per_second(),
        warnings=family_warnings(job, benchmarks, checkpoint, reference),
        config=job.model_dump(mode="json"),
    )


def family_warnings(
    job: EvaluateJob,
    benchmarks: Sequence[PreparedBenchmark],
    checkpoint: ResolvedCheckpoint,
    reference: ResolvedCheckpoint | None,
) -> tuple[str, ...]:
    """Returns a warning for each model that is evaluated with the prompts of another family.

    Only benchmarks with prompts by family count. The mini suite and NLVR have one prompt for all families.
    """
    names = [each.config.name for each in benchmarks if each.config.prompts]
    families = {model.pinned: family_of(model.path) for model in (checkpoint, reference) if model is not None}
    return tuple(
        f"{model} is a {family} model, but prompt_family is {job.prompt_family}: the prompts, expected answers and"
        f" metrics of {', '.join(names)} are those of {job.prompt_family} models; set prompt_family: {family}."
        for model, family in families.items()
        if names and family != job.prompt_family
    )


def pinned_job(job: EvaluateJob, checkpoint: ResolvedCheckpoint, reference: ResolvedCheckpoint | None) -> EvaluateJob:
    """Returns the job with pinned model references: if an alias moves, the job becomes another evaluation."""
    changes: dict[str, Any] = {"model": CheckpointModelConfig(reference=checkpoint.pinned)}
    if reference is not None:
        changes["reference"] = CheckpointModelConfig(reference=reference.pinned)
    return job.model_copy(update=changes)


def budgets_for(job: EvaluateJob, checkpoint: ResolvedCheckpoint) -> tuple[int, ...]:
    """Resolves the job's budgets to visual tokens per image, ascending; `blind` becomes 0.

    Raises:
        UnsupportedBudgetError: the connector or the reducer does not support a budget.
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


def predictions_of(storage: str) -> str:
    """Returns the folder or URI of the predictions that the evaluations of a storage share."""
    return f"{storage.removesuffix('/')}/predictions"


def evaluated_model(checkpoint: ResolvedCheckpoint, budgets: tuple[int, ...], storage: str) -> EvaluatedModel:
    """Describes the model of a pass.

    Args:
        checkpoint: the model.
        budgets: visual tokens per image; 0: blind.
        storage: absolute folder or URI of the job, below which predictions are stored.
    """
    return EvaluatedModel(checkpoint.path, checkpoint.pin, budgets, predictions_of(storage))


def prepare(job: EvaluateJob, image_size: int) -> list[PreparedBenchmark]:
    """Opens the benchmarks of a job.

    Args:
        job: the evaluation job.
        image_size: side of the images that procedural benchmarks draw, pixels.

    Raises:
        UserError: a benchmark or metric is unknown, or the data of a benchmark do not exist.
    """
    known = catalog([Path(path) for path in job.catalog])
    prepared = []
    for choice in job.benchmarks:
        config = _with_source(find(choice.name, known), choice)
        chosen = choice.metric or config.metric_of(job.prompt_family)
        if chosen is not None:
            metric(chosen, mask_decoder=Path(job.mask_decoder) if job.mask_decoder is not None else None)
        reader = open_reader(
            config,
            family=job.prompt_family,
            data=Path(choice.data) if choice.data is not None else None,
            image_size=image_size,
        )
        rows: Sequence[int] = list(chosen_rows(reader, choice.limit, job.seed))
        prepared.append(PreparedBenchmark(choice, config, reader, rows, generation_of(job, choice, config)))
    return prepared


def generation_of(job: EvaluateJob, choice: BenchmarkChoice, config: BenchmarkConfig) -> GenerationSettings:
    """Returns how the answers to a benchmark are generated."""
    return GenerationSettings(
        max_new_tokens=choice.max_new_tokens or config.longest_answer(job.prompt_family),
        dtype=job.dtype,
        decoding=choice.decoding or config.decoding,
        num_beams=config.num_beams if choice.decoding is None else 1,
        reducer=job.reducer.to_json() if job.reducer is not None else None,
        anchor_grid=job.anchor_grid,
    )


def _with_source(config: BenchmarkConfig, choice: BenchmarkChoice) -> BenchmarkConfig:
    if choice.label is not None:
        config = config.model_copy(update={"name": choice.label})
    if not choice.source:
        return config
    data = config.model_dump(mode="json")
    return validate(
        BenchmarkConfig, data | {"source": data["source"] | choice.source}, f"benchmark {config.name} of the job"
    )


def _sample_flops(job: EvaluateJob, config: ElasticConfig, shape: BackboneShape, budget: int, num_images: int) -> int:
    """Returns the FLOPs of one sample at one budget, after the run of the vision tower that all samples share."""
    if job.reducer is None or num_images == 0:
        plain = cost(shape, connector_at(job, config, budget), budget, num_images, _TEXT_TOKENS)
        return plain.total - plain.vision_encoder
    reduced = reduced_cost(shape, job.reducer, budget, num_images, _TEXT_TOKENS)
    # ToMe runs the vision tower again, at each budget.
    is_shared = not isinstance(job.reducer, ToMeConfig)
    return reduced.total - is_shared * reduced.model.vision_encoder


def connector_at(job: EvaluateJob, config: ElasticConfig, budget: int) -> ConnectorConfig | None:
    """Returns the connector whose cost counts at a budget; None with a reducer (see `reduced_cost` for its cost)."""
    if job.reducer is not None:
        return None
    connector = config.connector_config
    if job.anchor_grid is None or not isinstance(connector, ParcelConnectorConfig):
        return connector
    return connector.model_copy(
        update={"routing": (RouteConfig(min_budget=budget, max_budget=budget, anchor_grid=job.anchor_grid),)}
    )
