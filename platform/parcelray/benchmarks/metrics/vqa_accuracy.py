"""VQA accuracy: a prediction scores 1 if at least three annotators gave it (Antol et al., ICCV 2015).

See visualqa.org/evaluation.html, also for the text normalisation with its quirks: number words, articles, contractions
without their apostrophe and punctuation, and the extra step of EvalAI and the m4c scorers before them.

Variants:
    leave_one_out: the official scorer (VQAv2) and big_vision's `vqav2`. Leaves out each human answer in turn, and takes
        the mean of min(matches among the others / 3, 1). Text is normalised only if the annotators disagree.
    always_normalized: like leave_one_out, but always normalised (lmms-eval since its pull request 794).
    m4c: like always_normalized, after EvalAI's pre-step (lmms-eval's and LLaVA's TextVQA, VizWiz, OK-VQA).
    simple: min(matches / 3, 1) on normalised text.
    big_vision: its evaluator `vqa`: min(equal strings / 3, 1) on raw, case-sensitive text; a single answer is compared
        by equality.

Metadata read: `answer_type` and `question_type` (optional; sub-scores).
"""

import re
from collections.abc import Callable, Sequence

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, by_metadata, variants
from parcelray.datasets.sample import Sample

_ENOUGH = 3

_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)

NUMERALS = {"none": "0"} | {word: str(value) for value, word in enumerate(_WORDS)}
"""Digits of the words `none` and `zero` to `twenty`."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The look-behind of the official pattern is malformed: a full stop after a digit is removed too.
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {word: digits for word, digits in NUMERALS.items() if int(digits) <= 10}
# The scorer's table has each of these with one apostrophe missing. Its entries with capitals (Im, Ive, Id've) can
# never match a lower-cased word and are left out.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've"
    " he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't"
    " not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll"
    " somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd"
    " there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll"
    " what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's"
    " won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:index] + word[index + 1 :] for index, letter in enumerate(word) if letter == "'"]


# In the official table "somebody'd" loses its apostrophe, and the scorer uses that table.
_RESTORED = {typed: word for word in _CONTRACTIONS.split() for typed in _without_one_apostrophe(word)} | {
    "somebody'd": "somebodyd"
}


def strip_spaces(text: str) -> str:
    """Returns the text with newlines and tabs as spaces, and stripped. The scorer always does this first."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize(text: str) -> str:
    """Normalises punctuation, articles, number words and contractions as the official scorer does, in lower case."""
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def m4c_pre_step(text: str) -> str:
    """Applies the first step of EvalAI's and m4c's scorers: lower case, no commas or question marks, `'s` split off."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def _without_punctuation(text: str) -> str:
    number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        # As in the official code, a comma inside a number deletes every mark in the text.
        deleted = number_with_comma or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if deleted else " ")
    return _FULL_STOP.sub("", cleaned)


def leave_one_out(matches: Sequence[bool]) -> float:
    """Returns the mean over the left-out answers of min(matches among the others / 3, 1)."""
    num_matches = sum(matches)
    return sum(min((num_matches - match) / _ENOUGH, 1.0) for match in matches) / len(matches)


def official(prediction: str, answers: Sequence[str]) -> Judgement:
    """Scores by the official rule. Needs at least two answers, because one of them is left out."""
    if len(answers) < 2:
        return UNSCORED
    given, human = strip_spaces(prediction), [strip_spaces(answer) for answer in answers]
    if len(set(human)) > 1:
        given, human = normalize(given), [normalize(answer) for answer in human]
    return Judgement(leave_one_out([given == answer for answer in human]))


def always_normalized(prediction: str, answers: Sequence[str]) -> Judgement:
    """Scores by leave-one-out on normalised text."""
    return _left_out(prediction, answers, lambda text: normalize(strip_spaces(text)))


def m4c(prediction: str, answers: Sequence[str]) -> Judgement:
    """Scores by leave-one-out on text as EvalAI normalises it."""
    return _left_out(prediction, answers, lambda text: normalize(strip_spaces(m4c_pre_step(text))))


def simple(prediction: str, answers: Sequence[str]) -> Judgement:
    """Scores min(matches / 3, 1) on normalised text."""
    if not answers:
        return UNSCORED
    given = normalize(strip_spaces(prediction))
    return Judgement(min(sum(given == normalize(strip_spaces(answer)) for answer in answers) / _ENOUGH, 1.0))


def big_vision(prediction: str, answers: Sequence[str]) -> Judgement:
    """Scores min(equal strings / 3, 1); a single answer by equality."""
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
