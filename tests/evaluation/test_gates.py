"""Gates that stored answers decide, on answers by hand."""

from collections.abc import Sequence

import pytest

from parcelray.config.promote import GoldenAnswer, RegressionGate, RetentionGate
from parcelray.data.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.evaluation import Evaluation
from parcelray.evaluation.gates import check_golden, check_regression, check_retention
from parcelray.evaluation.split_scores import GivenAnswer, ScoringRules, score_splits
from parcelray.evaluation.summary import Summary, summarize

FAMILIES = ("general", "grounding")


def _summary(shares: dict[int, tuple[float, float]], count: int = 100, ids: str = "q") -> Summary:
    """A model that answers a share of each family's questions rightly, at each budget the first ones."""
    samples = [
        Sample(id=f"{ids}{family}{index}", benchmark="b", family=family, task="t", images=(), prompt="?", answers=("yes",), scene=f"{family}{index}")
        for family in FAMILIES
        for index in range(count)
    ]
    answers: dict[int, Sequence[GivenAnswer]] = {
        budget: [GivenAnswer("yes" if index < share * count else "no") for share in by_family for index in range(count)] for budget, by_family in shares.items()
    }
    splits = score_splits(samples, answers, ScoringRules(split_of=lambda sample: f"b/{sample.family}"))
    evaluation = Evaluation("e", "sha256:1", "sha256:1", tuple(sorted(shares)), max(shares), "nowhere", ())
    return summarize(evaluation, splits, 5.0, None)


CANDIDATE = _summary({16: (0.4, 0.1), 256: (0.8, 0.5)})


def test_retention_is_asked_overall_and_by_family() -> None:
    # 16 tokens keep 50 % of general and 20 % of grounding.
    gate = RetentionGate(overall={16: 35, 256: 100}, families={"general": {16: 50}, "grounding": {16: 30}})
    checks = list(check_retention(CANDIDATE, gate))
    assert [check.passed for check in checks] == [True, True, True, False]
    assert str(checks[-1]).startswith("retention of grounding at 16 visual tokens is 20.0 % [")
    assert str(checks[-1]).endswith("but the gate asks for at least 30 %")
    with pytest.raises(UserError, match=r"names 'video', but the families that were asked are general, grounding"):
        list(check_retention(CANDIDATE, RetentionGate(families={"video": {16: 1}})))


def test_a_score_that_cannot_be_known_does_not_pass() -> None:
    nothing = _summary({16: (0.0, 0.0), 256: (0.0, 0.0)})
    assert [check.passed for check in check_retention(nothing, RetentionGate(overall={16: 0}))] == [False]


def test_regression_is_ruled_out_or_not() -> None:
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
    assert any("-5.00 points" in check.found for check in checks)
    assert all(check.passed for check in check_regression(CANDIDATE, worse, RegressionGate(margin=0)) if "all splits" in check.what)


def test_what_the_margin_allows_on_average_must_be_sure() -> None:
    """Six points are lost with a margin of seven: with a hundred questions a family that is not sure, with two thousand it is."""
    for count, sure in ((100, False), (2000, True)):
        better, worse = (_summary({64: (share, share)}, count) for share in (0.80, 0.74))
        assert [check.passed for check in check_regression(worse, better, RegressionGate(margin=7))] == [sure]


def test_other_samples_are_not_compared() -> None:
    with pytest.raises(UserError, match="different samples, so they cannot be paired"):
        list(check_regression(CANDIDATE, _summary({16: (0.4, 0.1), 256: (0.8, 0.5)}, ids="other"), RegressionGate(margin=1)))


def test_golden_answers_are_right_by_metric_or_to_the_letter() -> None:
    golden = [
        GoldenAnswer(benchmark="b", sample="qgeneral0", budgets=(16, 256)),
        GoldenAnswer(benchmark="b", sample="qgrounding30", budgets=(16, 256)),
        GoldenAnswer(benchmark="b", sample="qgeneral0", budgets=(256,), answers=("Yes", "no")),
    ]
    checks = list(check_golden(CANDIDATE.splits, golden))
    assert [check.passed for check in checks] == [True, True, False, True, False]
    assert str(checks[2]) == "the answer to qgrounding30 at 16 visual tokens is 'no', but the gate asks for 'yes'"
    with pytest.raises(UserError, match="golden sample 'nobody' is not among those asked of b"):
        list(check_golden(CANDIDATE.splits, [GoldenAnswer(benchmark="b", sample="nobody", budgets=(16,))]))
