"""Objectives of a search, and checks of objectives and search spaces before the search starts."""

from collections.abc import Sequence
from typing import Literal

from parcelray.config.base import StrictModel
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.search_space import SearchSpace
from parcelray.config.train import TrainJob

COSTS = ("tokens", "gflops", "kv_cache_bytes", "latency_ms")
"""Costs that an evaluation measures: visual tokens, prefill GFLOPs, KV-cache bytes, time to first token (ms)."""
SCORES = ("score", "retention")
"""Quality metrics of an evaluation, in percent; `score/FAMILY` is the score of one benchmark family."""
_TRAINING = (
    *(f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "budget", "tokens_per_second")),
    *(
        f"tokens/{part}_{name}"
        for part in ("anchors", "queries")
        for name in ("effective_rank", "mean_cosine", "image_share")
    ),
)
_COSTS_OF_TRAINED = ("gflops", "kv_cache_bytes")
_FIXED = {
    "train": ("kind", "name", "storage", "tracking", "report"),
    "evaluate": ("kind", "name", "storage", "tracking", "compute", "reference", "need_within", "max_unscored"),
}
"""Job keys that a space must not change: the search sets them, or no trial reads them."""


class Objective(StrictModel):
    """One number that a search optimizes."""

    metric: str
    """Name of the metric.

    Evaluations: `score` or `retention`, optionally with `/FAMILY`, or a cost (tokens, gflops, kv_cache_bytes,
    latency_ms). Trainings: `val/score@BUDGET`, `gflops@BUDGET`, `kv_cache_bytes@BUDGET`, a training metric such as
    `train/loss`, or any metric of `evaluation`.
    """
    mode: Literal["max", "min"]
    """Direction: `max` if larger values are better, `min` if smaller ones are."""
    bounds: tuple[float, float] | None = None
    """Smallest and largest value, for the hypervolume.

    null: the known bounds of scores and evaluation costs; other metrics have none.
    """


def check_space(space: SearchSpace, base: EvaluateJob | TrainJob) -> None:
    """Checks that a space changes only keys that trials read.

    Raises:
        ValueError: the space changes another key; names it and all keys that cannot be searched.
    """
    fixed = _FIXED[base.kind]
    for name in space.parameters:
        if name.split(".")[0] in fixed:
            raise ValueError(
                f"the space {space.name} changes {name}, which has no effect on a trial; remove it. Not searchable:"
                f" {', '.join(fixed)}"
            )


def check_objectives(
    objectives: Sequence[Objective], base: EvaluateJob | TrainJob, evaluation: EvaluateJob | None, space: SearchSpace
) -> None:
    """Checks that every objective is measured by the trials.

    Raises:
        ValueError: an objective is not measured; names it and the legal metrics.
    """
    for metric in (objective.metric for objective in objectives):
        if isinstance(base, EvaluateJob):
            if not _is_evaluated(metric, has_reference=True):
                raise ValueError(
                    f"objective {metric!r} is not measured by an evaluation; legal: {', '.join(SCORES)} (both also"
                    f" with /FAMILY), {', '.join(COSTS)}"
                )
        elif not _is_trained(metric, base, space) and not (
            evaluation is not None and _is_evaluated(metric, has_reference=evaluation.reference is not None)
        ):
            budgets = ", ".join(map(str, base.validation.budgets))
            names = ", ".join(("val/score@B", *(f"{cost}@B" for cost in _COSTS_OF_TRAINED)))
            other = (
                "metrics of its evaluation (retention only with evaluation.reference)"
                if evaluation
                else "with the key evaluation also score, retention and costs"
            )
            raise ValueError(
                f"objective {metric!r} is not measured by a training with validation budgets {budgets}; legal:"
                f" {names} for these budgets B (add others to base.validation.budgets), {', '.join(_TRAINING)}; {other}"
            )


def is_measured_during(metric: str, base: TrainJob) -> bool:
    """Whether a training measures a metric at its checkpoints, and not only at its end."""
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
