"""What an evaluation would do, before it does it: rows, answers and an estimate of the compute."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parcelray.config.connector import ConnectorConfig, ParcelConnectorConfig, RouteConfig
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.identity import identity
from parcelray.evaluation.predict.predictor import BLIND
from parcelray.evaluation.setup import budgets_for, pinned_job, prepare
from parcelray.evaluation.tables import budget_name
from parcelray.models.processor import image_size_of
from parcelray.models.vlm import ElasticConfig, config_of
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.flops import cost
from parcelray.profiling.machine import matmul_flops_per_second
from parcelray.tracking.provenance import resolve_model

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class EvaluationPlan:
    """The resolved evaluation with its estimates."""

    identity: str
    model: str
    budgets: tuple[int, ...]
    rows: dict[str, int]
    """By benchmark."""
    questions: int
    """Estimated from the first row of each benchmark."""
    answers: int
    flops: int
    """Vision tower once an image, connector and prefill at every budget; without the tokens of the answers."""
    seconds: float
    """At the matrix-product speed measured on this machine now; a lower bound."""
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__}

    def to_rich(self) -> "Table":
        """For the console."""
        from rich.table import Table

        table = Table("plan", self.identity, show_lines=False)
        rows = {
            "model": self.model,
            "visual-token budgets": ", ".join(budget_name(budget) for budget in self.budgets),
            "rows": ", ".join(f"{name} {count:,}" for name, count in self.rows.items()),
            "answers": (
                f"about {self.answers:,} ({self.questions:,} questions at {len(self.budgets)} budgets); those in the"
                " store are not computed again"
            ),
            "compute": f"{self.flops / 1e12:,.2f} TFLOP before the answers' own tokens",
            "time": f"at least {self.seconds / 60:,.1f} min at this machine's matrix-product speed",
        }
        for key, value in rows.items():
            table.add_row(key, value)
        return table


def evaluation_plan(job: EvaluateJob) -> EvaluationPlan:
    """Resolves a job, checks that its parts fit together, and estimates its cost.

    Raises:
        UserError: a model, benchmark or data set is not there, or the connector cannot give a budget.
    """
    checkpoint = resolve_model(job.model, job.tracking.uri)
    reference = resolve_model(job.reference, job.tracking.uri) if job.reference is not None else None
    budgets = budgets_for(job, checkpoint)
    benchmarks = prepare(job, image_size_of(checkpoint.path))
    config = config_of(checkpoint.path)
    shape = from_transformers_config(config)
    questions = flops = 0
    for benchmark in benchmarks:
        first = benchmark.task.reader.read(benchmark.task.rows[0]).samples
        count = len(benchmark.task.rows) * max(1, len(first))
        images = len(first[0].images) if first else 1
        questions += count
        costs = [
            cost(shape, connector_at(job, config, budget), budget, num_frames=images, num_text_tokens=32)
            for budget in budgets
            if budget != BLIND
        ]
        if costs:
            vision = costs[0].vision_encoder
            flops += len(benchmark.task.rows) * vision + count * sum(each.total - each.vision_encoder for each in costs)
    return EvaluationPlan(
        identity=identity(pinned_job(job, checkpoint, reference)),
        model=checkpoint.pinned,
        budgets=budgets,
        rows={benchmark.config.name: len(benchmark.task.rows) for benchmark in benchmarks},
        questions=questions,
        answers=questions * len(budgets),
        flops=flops,
        seconds=flops / matmul_flops_per_second(),
        config=job.model_dump(mode="json"),
    )


def connector_at(job: EvaluateJob, config: ElasticConfig, budget: int) -> ConnectorConfig | None:
    """What gives the budget; a reducer's own cost is left out."""
    if job.reducer is not None:
        return None
    connector = config.connector_config
    if job.anchor_grid is None or not isinstance(connector, ParcelConnectorConfig):
        return connector
    return connector.model_copy(
        update={"routing": (RouteConfig(min_budget=budget, max_budget=budget, anchor_grid=job.anchor_grid),)}
    )
