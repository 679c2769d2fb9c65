"""The promotion gates that stored predictions decide: retention, regression against the champion, golden answers."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from parcelray.config.promote import GoldenAnswer, RegressionGate, RetentionGate
from parcelray.console import percent
from parcelray.errors import UserError
from parcelray.evaluation.scoring.paired import paired_difference
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.evaluation.scoring.summary import Summary


class Check(NamedTuple):
    """One measured value or fact, and the requirement of a gate for it."""

    gate: str
    """`artifacts`, `retention`, `regression`, `golden` or `latency`."""
    what: str
    """The measured quantity, such as `retention of grounding at 16 visual tokens`."""
    measured: str
    required: str
    passed: bool
    budget: int | None = None
    """Visual-token budget of the measured value; None if it has no single budget."""

    def __str__(self) -> str:
        return f"{self.what} is {self.measured}, but the gate requires {self.required}"

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON-serialisable values."""
        return {
            "gate": self.gate,
            "what": self.what,
            "found": self.measured,
            "asked": self.required,
            "passed": self.passed,
            "budget": self.budget,
        }


def check_retention(summary: Summary, gate: RetentionGate) -> Iterator[Check]:
    """Check the retention at every budget that the gate names, over all splits and by family.

    Raises:
        UserError: the gate names a family that was not evaluated.
    """
    for budget, least in gate.overall.items():
        yield _retention(summary, "all splits", None, budget, least)
    families = summary.families
    for family, by_budget in gate.families.items():
        if family not in families:
            raise UserError(
                f"gates.retention.families names {family!r}, but the evaluated families are {', '.join(families)};"
                " name one of them."
            )
        for budget, least in by_budget.items():
            yield _retention(summary, family, families[family], budget, least)


def check_regression(candidate: Summary, champion: Summary, gate: RegressionGate) -> Iterator[Check]:
    """Compare the candidate with the champion on the same samples, at every budget.

    Raises:
        UserError: the two were evaluated on different samples.
    """
    _check_same_samples(candidate.splits, champion.splits)
    theirs = {split.name: split for split in champion.splits}
    groups: list[tuple[str, Sequence[str] | None, float]] = [("all splits", None, gate.margin)]
    if gate.family_margin is not None:
        groups += [(family, names, gate.family_margin) for family, names in candidate.families.items()]
    for budget in candidate.budgets:
        comparable = []
        for split in candidate.splits:
            ours, base = split.scores[budget].estimate.n, theirs[split.name].scores[budget].estimate.n
            if ours and base:
                comparable.append(split)
            elif base:
                yield Check(
                    gate="regression",
                    what=f"the score on {split.name} at {budget} visual tokens",
                    measured="not available, because no answer could be scored",
                    required="a score",
                    passed=False,
                    budget=budget,
                )
        for group, names, margin in groups:
            # Both means are over the same splits: leaving out a hard split must not raise a model's mean.
            both = [split for split in comparable if names is None or split.name in names]
            gap = paired_difference(both, budget, [[theirs[split.name] for split in both]], budget).interval
            yield Check(
                gate="regression",
                what=f"the score on {group} at {budget} visual tokens against the champion's",
                measured=f"{gap.value:+.2f} points [{gap.low:+.2f}, {gap.high:+.2f}]",
                required=f"a lower end of at least {-margin:+g}",
                passed=gap.low >= -margin,
                budget=budget,
            )


def check_golden(splits: Sequence[SplitScores], golden: Sequence[GoldenAnswer]) -> Iterator[Check]:
    """Check the answer to every golden question at every budget that it names.

    Raises:
        UserError: a golden sample was not evaluated.
    """
    positions = {
        (split.benchmark, sample.id): (split, position)
        for split in splits
        for position, sample in enumerate(split.samples)
    }
    for each in golden:
        if (each.benchmark, each.sample) not in positions:
            raise UserError(
                f"The golden sample {each.sample!r} is not among the evaluated samples of {each.benchmark}; name a"
                " sample that is in `samples.parquet` of the gate's evaluation."
            )
        split, position = positions[each.benchmark, each.sample]
        legal = each.answers or split.samples[position].answers
        for budget in each.budgets:
            text = split.answers[budget][position].text
            passed = text in each.answers if each.answers else split.scores[budget].values[position] >= 1
            yield Check(
                gate="golden",
                what=f"the answer to {each.sample} at {budget} visual tokens",
                measured=repr(text),
                required=" or ".join(map(repr, legal)),
                passed=passed,
                budget=budget,
            )


def accepted_budgets(checks: Sequence[Check], budgets: Sequence[int]) -> list[int]:
    """The budgets whose answers were checked at least once and passed every check; none if the artifacts are wrong.

    Args:
        checks: checks of all gates; those of the latency gate are ignored, since they do not concern answers.
        budgets: the evaluated budgets.
    """
    if not all(check.passed for check in checks if check.gate == "artifacts"):
        return []
    about = {
        budget: [check.passed for check in checks if check.budget == budget and check.gate != "latency"]
        for budget in budgets
    }
    return sorted(budget for budget, passed in about.items() if passed and all(passed))


def _retention(summary: Summary, group: str, names: Sequence[str] | None, budget: int, least: float) -> Check:
    kept = summary.mean_retention(budget, names).interval
    return Check(
        gate="retention",
        what=f"retention of {group} at {budget} visual tokens",
        measured=percent(kept.value, kept.low, kept.high),
        required=f"at least {least:g} %",
        # If the reference scored nothing, the retention is NaN; comparisons with NaN are false, so it does not pass.
        passed=kept.value >= least,
        budget=budget,
    )


def _check_same_samples(candidate: Sequence[SplitScores], champion: Sequence[SplitScores]) -> None:
    ours, theirs = (
        {split.name: [sample.id for sample in split.samples] for split in splits} for splits in (candidate, champion)
    )
    if ours != theirs:
        raise UserError(
            "Candidate and champion were evaluated on different samples, so they cannot be compared in pairs; evaluate"
            " both on the same data."
        )
