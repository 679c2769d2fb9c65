"""The gates of a promotion that stored answers decide: retention, regression against the champion, golden answers."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from parcelray.config.promote import GoldenAnswer, RegressionGate, RetentionGate
from parcelray.errors import UserError
from parcelray.evaluation.scoring.aggregate import difference
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.evaluation.scoring.summary import Summary


class Check(NamedTuple):
    """One number, or one fact, against what a gate asks."""

    gate: str
    what: str
    """What was looked at, such as `retention of grounding at 16 visual tokens`."""
    found: str
    """What it is."""
    asked: str
    """What the gate asks."""
    passed: bool
    budget: int | None = None
    """The visual-token budget that it is about; None: no single one."""

    def __str__(self) -> str:
        return f"{self.what} is {self.found}, but the gate asks for {self.asked}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return self._asdict()


def check_retention(summary: Summary, gate: RetentionGate) -> Iterator[Check]:
    """Retention at every budget that the gate names, overall and by family.

    Raises:
        UserError: the gate names a family that was not asked.
    """
    for budget, least in gate.overall.items():
        yield _retention(summary, "all splits", None, budget, least)
    families = summary.families
    for family, by_budget in gate.families.items():
        if family not in families:
            raise UserError(
                f"gates.retention.families names {family!r}, but the families that were asked are"
                f" {', '.join(families)}; name one of them."
            )
        for budget, least in by_budget.items():
            yield _retention(summary, family, families[family], budget, least)


def check_regression(candidate: Summary, champion: Summary, gate: RegressionGate) -> Iterator[Check]:
    """The candidate against the champion on the same samples, at every budget.

    Raises:
        UserError: the two were not asked the same.
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
                comparable.append(split.name)
            elif base:
                yield Check(
                    "regression",
                    f"the score on {split.name} at {budget} visual tokens",
                    "nothing that could be scored",
                    "a score",
                    False,
                    budget,
                )
        for group, names, margin in groups:
            # Both over the same splits: a mean that leaves a hard one out is no better for it.
            both = [name for name in comparable if names is None or name in names]
            gap = difference(candidate.mean_score(budget, both), champion.mean_score(budget, both)).interval
            yield Check(
                gate="regression",
                what=f"the score on {group} at {budget} visual tokens against the champion's",
                found=f"{gap.value:+.2f} points [{gap.low:+.2f}, {gap.high:+.2f}]",
                asked=f"a lower end of at least {-margin:+g}",
                passed=gap.low >= -margin,
                budget=budget,
            )


def check_golden(splits: Sequence[SplitScores], golden: Sequence[GoldenAnswer]) -> Iterator[Check]:
    """Every golden question at every budget that it names.

    Raises:
        UserError: a sample was not asked.
    """
    places = {
        (split.benchmark, sample.id): (split, place) for split in splits for place, sample in enumerate(split.samples)
    }
    for each in golden:
        if (each.benchmark, each.sample) not in places:
            raise UserError(
                f"The golden sample {each.sample!r} is not among those asked of {each.benchmark}; name one that"
                " `samples.parquet` of the gate holds."
            )
        split, place = places[each.benchmark, each.sample]
        legal = each.answers or split.samples[place].answers
        for budget in each.budgets:
            text = split.answers[budget][place].text
            passed = text in each.answers if each.answers else split.scores[budget].values[place] >= 1
            yield Check(
                gate="golden",
                what=f"the answer to {each.sample} at {budget} visual tokens",
                found=repr(text),
                asked=" or ".join(map(repr, legal)),
                passed=passed,
                budget=budget,
            )


def accepted_budgets(checks: Sequence[Check], budgets: Sequence[int]) -> list[int]:
    """Budgets that something was asked about the answers of, and nothing fell short of it; none where the files are not in order.

    Args:
        checks: of all gates; those of the latency say nothing about answers.
        budgets: that were asked.
    """
    if not all(check.passed for check in checks if check.gate == "card"):
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
        found=f"{kept.value:.1f} % [{kept.low:.1f}, {kept.high:.1f}]",
        asked=f"at least {least:g} %",
        # A comparison with NaN (nothing to retain) is false, so it does not pass.
        passed=kept.value >= least,
        budget=budget,
    )


def _check_same_samples(candidate: Sequence[SplitScores], champion: Sequence[SplitScores]) -> None:
    ours, theirs = (
        {split.name: [sample.id for sample in split.samples] for split in splits} for splits in (candidate, champion)
    )
    if ours != theirs:
        raise UserError(
            "Candidate and champion were asked different samples, so they cannot be paired; ask both again on the same"
            " data."
        )
