"""What a search can drive, and what it can change: checked before anything starts."""

from collections.abc import Sequence
from typing import Literal

from parcelray.config.base import StrictModel
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.search_space import SearchSpace
from parcelray.config.train import TrainJob

COSTS = ("tokens", "gflops", "kv_cache_bytes", "latency_ms")
"""What an evaluation measures besides its scores: visual tokens, FLOPs of the prefill, bytes of its KV cache, time to the first token."""
SCORES = ("score", "retention")
"""What it measures of the answers, in percent; of a family as `score/FAMILY`."""
_TRAINING = (
    *(f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "budget", "tokens_per_second")),
    *(f"tokens/{part}_{name}" for part in ("anchors", "queries") for name in ("effective_rank", "mean_cosine")),
)
_COSTS_OF_TRAINED = ("gflops", "kv_cache_bytes")
_FIXED = {
    "train": ("kind", "name", "storage", "tracking", "report"),
    "evaluate": ("kind", "name", "storage", "tracking", "compute", "reference", "need_within", "max_unscored"),
}
"""Keys that belong to the search and not to a trial, or that no trial looks at."""


class Objective(StrictModel):
    """One number that a search drives."""

    metric: str
    """Of an evaluation `score`, `retention`, either with `/FAMILY`, or a cost (tokens, gflops, kv_cache_bytes, latency_ms); of a training
    `val/score@BUDGET`, `gflops@BUDGET`, `kv_cache_bytes@BUDGET`, one of its own metrics (train/loss), or what
    `evaluation` measures."""
    mode: Literal["max", "min"]
    """Whether more is better."""
    bounds: tuple[float, float] | None = None
    """Smallest and largest value for the hypervolume; null: those of scores and of an evaluation's costs are known, of the others there is none."""


def check_space(space: SearchSpace, base: EvaluateJob | TrainJob) -> None:
    """Refuses parameters that no trial would follow.

    Raises:
        ValueError: naming the parameter and what no space can change.
    """
    fixed = _FIXED[base.kind]
    for name in space.parameters:
        if name.split(".")[0] in fixed:
            raise ValueError(
                f"the space {space.name} changes {name}, which no trial of a search follows; not searchable:"
                f" {', '.join(fixed)}"
            )


def check_objectives(
    objectives: Sequence[Objective], base: EvaluateJob | TrainJob, evaluation: EvaluateJob | None, space: SearchSpace
) -> None:
    """Refuses objectives that no trial measures.

    Raises:
        ValueError: naming the objective and what is measured.
    """
    for metric in (objective.metric for objective in objectives):
        if isinstance(base, EvaluateJob):
            if not _is_evaluated(metric, has_reference=True):
                raise ValueError(
                    f"objective {metric!r} is not measured by an evaluation; legal: {', '.join(SCORES)}, either with"
                    f" /FAMILY, {', '.join(COSTS)}"
                )
        elif not _is_trained(metric, base, space) and not (
            evaluation is not None and _is_evaluated(metric, has_reference=evaluation.reference is not None)
        ):
            budgets = ", ".join(map(str, base.validation.budgets))
            names = ", ".join(("val/score@B", *(f"{cost}@B" for cost in _COSTS_OF_TRAINED)))
            other = (
                "what its evaluation measures (retention only with evaluation.reference)"
                if evaluation
                else "with `evaluation` score, retention and costs"
            )
            raise ValueError(
                f"objective {metric!r} is not measured by a training that is validated at budgets {budgets}; legal:"
                f" {names} for those budgets (base.validation.budgets adds others), {', '.join(_TRAINING)}; {other}"
            )


def is_measured_during(metric: str, base: TrainJob) -> bool:
    """Whether a training knows it at its checkpoints, and not only at its end."""
    return metric in _TRAINING or (metric.startswith("val/") and base.validation.every_steps > 0)


def _is_evaluated(metric: str, *, has_reference: bool) -> bool:
    name, _, family = metric.partition("/")
    return name == "score" or (name == "retention" and has_reference) or (name in COSTS and not family)


def _is_trained(metric: str, base: TrainJob, space: SearchSpace) -> bool:
    name, _, budget = metric.partition("@")
    if name in ("val/score", *_COSTS_OF_TRAINED) and budget.isdecimal():
        searched = any(key.startswith("validation") for key in space.parameters)
        return searched or int(budget) in base.validation.budgets
    return metric in _TRAINING
