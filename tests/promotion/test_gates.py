"""Promotion gates on stored answers, with answers written by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from parcelray.config.promote import GoldenAnswer, RegressionGate, RetentionGate
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.scoring.estimate import Estimate
from parcelray.evaluation.scoring.evaluation import Evaluation
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, score_splits
from parcelray.evaluation.scoring.summary import Summary, summarize
from parcelray.promotion.gates import Check, accepted_budgets, check_golden, check_regression, check_retention

FAMILIES = ("general", "grounding")


def _summary(
    shares: dict[int, tuple[float, float]], count: int = 100, ids: str = "q", unscored: Sequence[str] = ()
) -> Summary:
    """Scores of a model that answers the first `share` of each family's questions correctly, at each budget.

    Args:
        shares: share of correct answers for each family of `FAMILIES`, by budget.
        count: number of questions per family.
        ids: prefix of the sample ids.
        unscored: families of which no answer could be scored.
    """
    samples = [
        Sample(
            id=f"{ids}{family}{index}",
            benchmark="b",
            family=family,
            task="t",
            images=(),
            prompt="?",
            answers=("yes",),
            scene=f"{family}{index}",
        )
        for family in FAMILIES
        for index in range(count)
    ]
    answers: dict[int, Sequence[GivenAnswer]] = {
        budget: [GivenAnswer("yes" if index < share * count else "no") for share in by_family for index in range(count)]
        for budget, by_family in shares.items()
    }
    splits = score_splits(samples, answers, ScoringRules(split_of=lambda sample: f"b/{sample.family}"))
    for index, split in enumerate(splits):
        if split.family in unscored:
            nothing = {
                budget: replace(score, estimate=Estimate(math.nan, np.full_like(score.estimate.draws, np.nan), 0))
                for budget, score in split.scores.items()
            }
            splits[index] = replace(split, scores=nothing)
    evaluation = Evaluation("e", "sha256:1", "sha256:1", tuple(sorted(shares)), max(shares), "nowhere", ())
    return summarize(evaluation, splits, 5.0, None)


CANDIDATE = _summary({16: (0.4, 0.1), 256: (0.8, 0.5)})


def test_retention_is_checked_overall_and_by_family() -> None:
    # At 16 visual tokens, retention is 50 % in general and 20 % in grounding.
    gate = RetentionGate(overall={16: 35, 256: 100}, families={"general": {16: 50}, "grounding": {16: 30}})
    checks = list(check_retention(CANDIDATE, gate))
    assert [check.passed for check in checks] == [True, True, True, False]
    assert str(checks[-1]).startswith("retention of grounding at 16 visual tokens is 20.0 % [")
    assert str(checks[-1]).endswith("but the gate requires at least 30 %")
    with pytest.raises(UserError, match=r"names 'video', but the evaluated families are general, grounding"):
        list(check_retention(CANDIDATE, RetentionGate(families={"video": {16: 1}})))


def test_undefined_retention_does_not_pass() -> None:
    nothing = _summary({16: (0.0, 0.0), 256: (0.0, 0.0)})
    assert [check.passed for check in check_retention(nothing, RetentionGate(overall={16: 0}))] == [False]


def test_regression_passes_only_within_the_margin() -> None:
    same = list(check_regression(CANDIDATE, CANDIDATE, RegressionGate(margin=0)))
    assert [check.passed for check in same] == [True, True]
    worse = _summary({16: (0.4, 0.1), 256: (0.7, 0.5)})
    checks = list(check_regression(worse, CANDIDATE, RegressionGate(margin=3, family_margin=5)))
    by_what = {check.what: check.passed for check in checks}
    assert by_what == {
        "the score on all splits at 16 visual tokens against the champion's": True,
        "the score on general at 16 visual tokens against the champion's": True,
        "the score on grounding at 16 visual tokens against the champion's": True,
        "the score on all splits at 256 visual tokens against the champion's": False,
        "the score on general at 256 visual tokens against the champion's": False,
        "the score on grounding at 256 visual tokens against the champion's": True,
    }
    assert any("-5.00 points" in check.measured for check in checks)
    assert all(
        check.passed
        for check in check_regression(CANDIDATE, worse, RegressionGate(margin=0))
        if "all splits" in check.what
    )


def test_the_whole_interval_must_lie_within_the_margin() -> None:
    """A loss of 6 points with a margin of 7 does not pass with 100 questions per family, but does with 2,000."""
    for count, passes in ((100, False), (2000, True)):
        better, worse = (_summary({64: (share, share)}, count) for share in (0.80, 0.74))
        assert [check.passed for check in check_regression(worse, better, RegressionGate(margin=7))] == [passes]


def test_both_models_are_averaged_over_the_same_splits() -> None:
    """A champion without a score on a hard split must not be better than a candidate that has scores on both."""
    champion = _summary({64: (0.8, 0.1)}, unscored=["grounding"])
    same = list(check_regression(_summary({64: (0.8, 0.1)}), champion, RegressionGate(margin=1)))
    assert [(check.passed, check.measured.split(" ")[0]) for check in same] == [(True, "+0.00")]
    lost = list(check_regression(champion, _summary({64: (0.8, 0.1)}), RegressionGate(margin=1)))
    assert [check.passed for check in lost] == [False, True]
    assert (
        str(lost[0])
        == "the score on b/grounding at 64 visual tokens is not available, because no answer could be scored,"
        " but the gate requires a score"
    )


def test_a_budget_is_accepted_if_all_checks_of_its_answers_passed() -> None:
    def check(gate: str, budget: int | None, passed: bool = True) -> Check:
        return Check(gate, "what", "measured", "required", passed, budget)

    artifacts = check("artifacts", None)
    others = [
        check("retention", 16),
        check("golden", 16, False),
        check("retention", 64),
        check("latency", 64, False),
        check("latency", 256),
    ]
    assert accepted_budgets([artifacts, *others], [16, 64, 256]) == [64]
    assert accepted_budgets([artifacts, check("regression", None)], [16]) == []
    assert accepted_budgets([artifacts._replace(passed=False), *others], [16, 64]) == []


def test_models_evaluated_on_different_samples_are_not_compared() -> None:
    with pytest.raises(UserError, match="different samples, so they cannot be compared in pairs"):
        list(
            check_regression(
                CANDIDATE, _summary({16: (0.4, 0.1), 256: (0.8, 0.5)}, ids="other"), RegressionGate(margin=1)
            )
        )


def test_golden_answers_are_checked_by_the_metric_or_literally() -> None:
    golden = [
        GoldenAnswer(benchmark="b", sample="qgeneral0", budgets=(16, 256)),
        GoldenAnswer(benchmark="b", sample="qgrounding30", budgets=(16, 256)),
        GoldenAnswer(benchmark="b", sample="qgeneral0", budgets=(256,), answers=("Yes", "no")),
    ]
    checks = list(check_golden(CANDIDATE.splits, golden))
    assert [check.passed for check in checks] == [True, True, False, True, False]
    assert str(checks[2]) == "the answer to qgrounding30 at 16 visual tokens is 'no', but the gate requires 'yes'"
    with pytest.raises(UserError, match="golden sample 'nobody' is not among the evaluated samples of b"):
        list(check_golden(CANDIDATE.splits, [GoldenAnswer(benchmark="b", sample="nobody", budgets=(16,))]))
