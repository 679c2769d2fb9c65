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
"""None and zero to twenty."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official pattern's look-behind is malformed, so a digit before the full stop does not protect it.
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {word: digits for word, digits in NUMERALS.items() if int(digits) <= 10}
# The scorer's table holds each of these with one apostrophe dropped. Its entries with capitals (Im, Ive, Id've) can
# never match a lower-cased word and are not here.
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
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


# "somebody'd" loses its apostrophe in the official table; that is what the scorer does.
_RESTORED = {typed: word for word in _CONTRACTIONS.split() for typed in _without_one_apostrophe(word)} | {
    "somebody'd": "somebodyd"
}


def strip_spaces(text: str) -> str:
    """Newlines and tabs as spaces, none at the ends: the step that the scorer always takes."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize(text: str) -> str:
    """Punctuation, articles, number words and contractions as the official scorer treats them, in lower case."""
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def m4c_pre_step(text: str) -> str:
    """What EvalAI's and m4c's scorers do first: lower case, no commas and question marks, possessives apart."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def _without_punctuation(text: str) -> str:
    number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        # A comma inside a number deletes every mark in the text: so the official code has it.
        deleted = number_with_comma or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if deleted else " ")
    return _FULL_STOP.sub("", cleaned)


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
