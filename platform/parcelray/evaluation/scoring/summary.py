"""All numbers of an evaluation: scores and retention of splits and families, the needed budget, and the oracle.

The oracle uses for each sample the smallest budget with the best answer. Its score is an upper bound for any choice of
budgets per sample.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parcelray.evaluation.passes.store import EvaluatedBenchmark
from parcelray.evaluation.scoring.aggregate import retentions
from parcelray.evaluation.scoring.chance import Chance, chance
from parcelray.evaluation.scoring.estimate import Estimate, mean_of
from parcelray.evaluation.scoring.evaluation import Evaluation, load_evaluation
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.tracking.run_folder import local_folder

REFERENCE_FOLDER = "reference"
"""Folder of an evaluation that holds the evaluation of its reference model."""


class OraclePoint(NamedTuple):
    """An oracle that gives each sample the smallest budget with the best answer, up to a cap."""

    cap: int
    """Largest budget that the oracle may choose."""
    score: float
    """Mean over samples of the best value at any budget up to the cap, on the paper's scale."""
    mean_tokens: float
    """Mean number of visual tokens per image."""


@dataclass(frozen=True)
class Summary:
    """An evaluation with its scores and its reference."""

    evaluation: Evaluation
    splits: Sequence[SplitScores]
    reference: str
    """Pinned reference of the model that retention is relative to."""
    reference_budget: int
    """Visual tokens per image of the reference."""
    retention: Mapping[int, Mapping[str, Estimate]]
    """Percent of the reference's score, by budget and split."""
    need_within: float
    """Percent of the full score that the needed budget may lose."""

    @property
    def budgets(self) -> tuple[int, ...]:
        """Visual tokens per image, ascending; 0: blind."""
        return self.evaluation.budgets

    @property
    def families(self) -> dict[str, list[str]]:
        """Names of the splits of each family."""
        members: dict[str, list[str]] = {}
        for split in self.splits:
            members.setdefault(split.family, []).append(split.name)
        return members

    @cached_property
    def chance(self) -> dict[str, Chance | None]:
        """The score without a model, by split; see `chance`."""
        return {split.name: chance(split) for split in self.splits}

    def mean_retention(self, budget: int, names: Sequence[str] | None = None) -> Estimate:
        """Unweighted mean retention over splits: over the named ones, or over all."""
        kept = self.retention[budget]
        return mean_of([kept[name] for name in (names if names is not None else kept) if name in kept])

    def mean_score(self, budget: int, names: Sequence[str] | None = None) -> Estimate:
        """Unweighted mean score over splits, on the paper's scale: over the named ones, or over all."""
        chosen = [split for split in self.splits if names is None or split.name in names]
        return mean_of([split.scores[budget].estimate for split in chosen if split.scores[budget].estimate.n])

    def needed(self, split: SplitScores) -> int | None:
        """The smallest budget whose score is within `need_within` percent of the score at the largest budget."""
        return needed_budget(
            {budget: score.estimate.value for budget, score in split.scores.items()},
            max(self.budgets),
            self.need_within,
        )

    def oracle(self, split: SplitScores) -> list[OraclePoint]:
        """The oracle at every cap, see `oracle_curve`."""
        return oracle_curve(split)

    def sensitive(self) -> list[str]:
        """Names of the three splits with the lowest retention at the smallest budget with images."""
        visible = [
            budget
            for budget in self.budgets
            if budget and (budget != self.reference_budget or self.reference != self.evaluation.model)
        ]
        return (
            most_sensitive({name: kept.value for name, kept in self.retention[visible[0]].items()}) if visible else []
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as JSON-serialisable values."""
        return {
            "name": self.evaluation.name,
            "model": self.evaluation.model,
            "digest": self.evaluation.digest,
            "budgets": list(self.budgets),
            "full": self.evaluation.full,
            "reference": {"model": self.reference, "num_visual_tokens": self.reference_budget},
            "data": {each.config.name: _data(each) for each in self.evaluation.benchmarks},
            "splits": [self._split(split) for split in self.splits],
            "families": {
                family: {
                    str(budget): _means(self.mean_score(budget, names), self.mean_retention(budget, names))
                    for budget in self.budgets
                }
                for family, names in self.families.items()
            },
            "overall": {
                str(budget): _means(self.mean_score(budget), self.mean_retention(budget)) for budget in self.budgets
            },
            "most_sensitive": self.sensitive(),
            "need_within_percent": self.need_within,
        }

    def _split(self, split: SplitScores) -> dict[str, Any]:
        return {
            "name": split.name,
            "benchmark": split.benchmark,
            "family": split.family,
            "metric": split.metric,
            "comparable_on_a_part": split.additive,
            "whole": split.rules.whole,
            "samples": len(split.samples),
            "chance": by_chance._asdict() if (by_chance := self.chance[split.name]) is not None else None,
            "needed_budget": self.needed(split),
            "oracle": [point._asdict() for point in self.oracle(split)],
            "scores": {
                str(budget): {
                    **_estimate(score.estimate),
                    "unscored": score.unscored,
                    "unparsed": score.unparsed,
                    "empty": score.empty,
                    "cut_off": score.cut_off,
                    "mean_new_tokens": score.mean_new_tokens,
                    "totals": dict(score.totals),
                    "retention": (
                        _estimate(self.retention[budget][split.name]) if split.name in self.retention[budget] else None
                    ),
                }
                for budget, score in split.scores.items()
            },
        }


def summarize(
    evaluation: Evaluation,
    splits: Sequence[SplitScores],
    need_within: float,
    reference: tuple[Evaluation, Sequence[SplitScores]] | None,
) -> Summary:
    """Summarizes scores, with retention relative to a reference.

    Args:
        evaluation: the evaluation.
        splits: its scores.
        need_within: percent of the full score that the needed budget may lose.
        reference: evaluation and scores of the uncompressed model, of which the largest budget counts; None: the
            evaluation itself at its largest budget.
    """
    base, base_splits = reference if reference is not None else (evaluation, splits)
    budget = max(base.budgets)
    return Summary(
        evaluation=evaluation,
        splits=splits,
        reference=base.model,
        reference_budget=budget,
        retention={each: retentions(splits, each, base_splits, budget) for each in evaluation.budgets},
        need_within=need_within,
    )


def rescore(name: str | Path, metrics: Mapping[str, str], need_within: float) -> Summary:
    """Scores a finished evaluation again from its stored predictions, without the model and the data.

    Args:
        name: folder or URI of the evaluation.
        metrics: by benchmark, metric and variant that replace the evaluation's own.
        need_within: percent of the full score that the needed budget may lose.

    Raises:
        UserError: the folder holds no evaluation, predictions are missing, or a metric cannot score them.
    """
    folder = local_folder(name)
    evaluation = load_evaluation(folder)
    base = None
    if (folder / REFERENCE_FOLDER).is_dir():
        reference = load_evaluation(folder / REFERENCE_FOLDER)
        base = (reference, reference.score(metrics))
    return summarize(evaluation, evaluation.score(metrics), need_within, base)


def needed_budget(scores: Mapping[int, float], full: int, within: float) -> int | None:
    """Returns the smallest budget whose score is within `within` percent of the full score.

    Args:
        scores: scores by budget; budget 0 is the blind baseline.
        full: the budget whose score is the full score.
        within: percent of the full score that may be lost.

    Returns:
        The budget; None if the full score is 0 or unknown.
    """
    base = scores.get(full, math.nan)
    if math.isnan(base) or base <= 0:
        return None
    return min(budget for budget, score in scores.items() if score >= (1 - within / 100) * base)


def oracle_curve(split: SplitScores) -> list[OraclePoint]:
    """Computes the oracle at every cap, without the blind baseline; empty if the score is not a mean over samples."""
    budgets = sorted(budget for budget in split.scores if budget)
    if not split.additive or not budgets:
        return []
    values_BN = np.array([split.scores[budget].values for budget in budgets], dtype=np.float64)
    values_BN = values_BN[:, ~np.isnan(values_BN).any(axis=0)]
    if not values_BN.shape[1]:
        return []
    points = []
    for number, cap in enumerate(budgets, 1):
        best_N = values_BN[:number].max(axis=0)
        # argmax returns the first index, which is the smallest budget with the best value. A sample that is wrong at
        # every budget gets the smallest one.
        chosen_N = np.array(budgets)[values_BN[:number].argmax(axis=0)]
        points.append(OraclePoint(cap, split.scale * float(best_N.mean()), float(chosen_N.mean())))
    return points


def most_sensitive(retentions: Mapping[str, float], count: int = 3) -> list[str]:
    """Returns the splits with the lowest retention, the worst first (the paper reports 3 at 16 tokens)."""
    known = {name: value for name, value in retentions.items() if not math.isnan(value)}
    return sorted(known, key=lambda name: (known[name], name))[:count]


def _data(benchmark: EvaluatedBenchmark) -> dict[str, Any]:
    return {
        "revision": benchmark.fingerprint.revision,
        "rows": benchmark.rows,
        "rows_of_the_split": benchmark.fingerprint.rows,
        "rows_expected": getattr(benchmark.config.source, "rows", None),
        "ids": benchmark.fingerprint.ids,
        "unasked": [problem._asdict() for problem in benchmark.problems],
        "unscorable": benchmark.config.unscorable,
    }


def _means(score: Estimate, retention: Estimate) -> dict[str, Any]:
    return {"score": _estimate(score), "retention": _estimate(retention)}


def _estimate(estimate: Estimate) -> dict[str, Any]:
    interval = estimate.interval
    return {
        "value": interval.value,
        "std_error": estimate.std_error,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
    }
