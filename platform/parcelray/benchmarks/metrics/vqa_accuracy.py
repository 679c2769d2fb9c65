"""VQA accuracy: an answer counts in full once three people gave it (Antol et al., ICCV 2015; visualqa.org/evaluation.html).

Variants:
    leave_one_out: the official scorer (VQAv2) and big_vision's `vqav2`: mean over the ways of leaving one human answer
        out of min(matches among the others / 3, 1); text is normalised only where the people disagree.
    always_normalized: the same, always normalised (lmms-eval since its pull request 794).
    m4c: the same as always_normalized after EvalAI's pre-step (lmms-eval's and LLaVA's TextVQA, VizWiz, OK-VQA).
    simple: min(matches / 3, 1) on normalised text.
    big_vision: its evaluator `vqa`: min(equal strings / 3, 1), a single answer by equality; raw and case-sensitive
        text.

Metadata read: `answer_type` and `question_type` (optional; sub-scores).
"""

from collections.abc import Callable, Sequence

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, by_metadata, variants
from parcelray.benchmarks.metrics.vqa_text import m4c_pre_step, normalize, strip_spaces
from parcelray.datasets.sample import Sample

_ENOUGH = 3


def leave_one_out(matches: Sequence[bool]) -> float:
    """Mean over the left-out answers of min(matches among the others / 3, 1)."""
    found = sum(matches)
    return sum(min((found - match) / _ENOUGH, 1.0) for match in matches) / len(matches)


def official(prediction: str, answers: Sequence[str]) -> Judgement:
    """The official rule; needs at least two answers, since leaving out the only one leaves nothing to match."""
    if len(answers) < 2:
        return UNSCORED
    given, people = strip_spaces(prediction), [strip_spaces(answer) for answer in answers]
    if len(set(people)) > 1:
        given, people = normalize(given), [normalize(answer) for answer in people]
    return Judgement(leave_one_out([given == answer for answer in people]))


def always_normalized(prediction: str, answers: Sequence[str]) -> Judgement:
    """Leave-one-out on normalised text."""
    return _left_out(prediction, answers, lambda text: normalize(strip_spaces(text)))


def m4c(prediction: str, answers: Sequence[str]) -> Judgement:
    """Leave-one-out on text as EvalAI normalises it."""
    return _left_out(prediction, answers, lambda text: normalize(strip_spaces(m4c_pre_step(text))))


def simple(prediction: str, answers: Sequence[str]) -> Judgement:
    """min(matches / 3, 1) on normalised text."""
    if not answers:
        return UNSCORED
    given = normalize(strip_spaces(prediction))
    return Judgement(min(sum(given == normalize(strip_spaces(answer)) for answer in answers) / _ENOUGH, 1.0))


def big_vision(prediction: str, answers: Sequence[str]) -> Judgement:
    """min(equal strings / 3, 1); a single answer by equality."""
    if not answers:
        return UNSCORED
    matches = answers.count(prediction)
    return Judgement(float(matches) if len(answers) == 1 else min(matches / _ENOUGH, 1.0))


def _left_out(prediction: str, answers: Sequence[str], text: Callable[[str], str]) -> Judgement:
    if len(answers) < 2:
        return UNSCORED
    given = text(prediction)
    return Judgement(leave_one_out([given == text(answer) for answer in answers]))


def _groups(sample: Sample) -> tuple[str, ...]:
    return by_metadata("answer_type")(sample) + by_metadata("question_type")(sample)


def _metric(variant: str, rule: Callable[[str, Sequence[str]], Judgement]) -> PerSampleMetric:
    return PerSampleMetric(
        "vqa_accuracy", variant, lambda prediction, sample: rule(prediction, sample.answers), _groups
    )


VQA_ACCURACY = variants(
    _metric(variant, rule)
    for variant, rule in (
        ("leave_one_out", official),
        ("always_normalized", always_normalized),
        ("m4c", m4c),
        ("simple", simple),
        ("big_vision", big_vision),
    )
)
