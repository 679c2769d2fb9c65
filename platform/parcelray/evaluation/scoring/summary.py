"""Everything that an evaluation says, as numbers: splits, families, overall, retention, budgets that suffice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parcelray.evaluation.scoring.aggregate import mean_of, retentions
from parcelray.evaluation.scoring.budget_curves import OraclePoint, most_sensitive, needed_budget, oracle_curve
from parcelray.evaluation.scoring.evaluation import AskedBenchmark, Evaluation
from parcelray.evaluation.scoring.split_scores import Estimate, SplitScores


@dataclass(frozen=True)
class Summary:
    """An evaluation with its reference."""

    evaluation: Evaluation
    splits: Sequence[SplitScores]
    reference: str
    """The model that retention is measured against, pinned."""
    reference_budget: int
    """At how many visual tokens."""
    retention: Mapping[int, Mapping[str, Estimate]]
    """Percent of the reference, by budget and split."""
    need_within: float
    """Percent of the full score that the needed budget may lose."""

    @property
    def budgets(self) -> tuple[int, ...]:
        """Ascending."""
        return self.evaluation.budgets

    @property
    def families(self) -> dict[str, list[str]]:
        """The splits of each family."""
        members: dict[str, list[str]] = {}
        for split in self.splits:
            members.setdefault(split.family, []).append(split.name)
        return members

    def mean_retention(self, budget: int, names: Sequence[str] | None = None) -> Estimate:
        """Unweighted mean over splits; of some, or of all."""
        kept = self.retention[budget]
        return mean_of([kept[name] for name in (names if names is not None else kept) if name in kept])

    def mean_score(self, budget: int, names: Sequence[str] | None = None) -> Estimate:
        """Unweighted mean over splits of the scores on the paper's scale."""
        chosen = [split for split in self.splits if names is None or split.name in names]
        return mean_of([split.scores[budget].estimate for split in chosen if split.scores[budget].estimate.n])

    def needed(self, split: SplitScores) -> int | None:
        """The smallest budget within `need_within` percent of the largest."""
        return needed_budget(
            {budget: score.estimate.value for budget, score in split.scores.items()},
            max(self.budgets),
            self.need_within,
        )

    def oracle(self, split: SplitScores) -> list[OraclePoint]:
        """See `oracle_curve`."""
        return oracle_curve(split)

    def sensitive(self) -> list[str]:
        """The three splits that lose most at the smallest budget with images."""
        visible = [
            budget
            for budget in self.budgets
            if budget and (budget != self.reference_budget or self.reference != self.evaluation.model)
        ]
        return (
            most_sensitive({name: kept.value for name, kept in self.retention[visible[0]].items()}) if visible else []
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
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
    """Scores with retention against a reference.

    Args:
        evaluation: which model was asked what.
        splits: its scores.
        need_within: percent of the full score that the needed budget may lose.
        reference: the uncompressed model, at its largest budget; None: the evaluation itself at its own.
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


def _data(benchmark: AskedBenchmark) -> dict[str, Any]:
    asked = benchmark.asked
    return {
        "revision": asked.pin.revision,
        "rows": asked.rows,
        "rows_of_the_split": asked.pin.rows,
        "rows_expected": getattr(benchmark.config.source, "rows", None),
        "ids": asked.pin.ids,
        "unasked": [problem._asdict() for problem in asked.problems],
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
