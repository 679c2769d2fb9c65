"""Multiple-choice accuracy: parses which option a prediction names.

A prediction that no rule can parse is wrong and counted as unparsed. No option is drawn at random.

Variants (parsers):
    option: a single letter as a word, else the text of exactly one option (the rules that MMBench's scorer tries
        before it calls a judge model).
    llava_sqa: the whole prediction is a letter, or starts with "B. ", or contains exactly one "The answer is B."
        (LLaVA on ScienceQA).
    lmms_eval_sqa: the whole prediction is a letter in any case, or starts with a capital letter and a full stop.
    first_character: the first character of the stripped prediction (lmms-eval on SEED-Bench).
    paligemma_sqa: the prediction in lower case starts with "the answer is b." (big_vision on ScienceQA).

Metadata read: `choices` (required; option texts in order), `category` (optional; sub-scores). The first answer of a
sample is the letter of the correct option, its text, or the sentence "The answer is B.".
"""

import re
import string
from collections.abc import Callable, Sequence

from parcelray.benchmarks.metrics.base import (
    UNPARSED,
    UNSCORED,
    Judgement,
    PerSampleMetric,
    by_metadata,
    needed,
    variants,
)
from parcelray.datasets.sample import Sample

Reader = Callable[[str, Sequence[str]], str | None]
"""Maps a prediction and the option texts to a letter; None if it cannot be parsed."""

_ANSWER_IS = re.compile(r"The answer is ([A-Z])\.")
_MARKS = re.compile(r"[.()\[\],:;!*#{}'\"]")
_SHORT = 3


def letters(choices: Sequence[str]) -> str:
    """Returns the letters of the options, starting at A."""
    return string.ascii_uppercase[: len(choices)]


def read_option(text: str, choices: Sequence[str]) -> str | None:
    """Parses a single letter as a word, else the text of exactly one option.

    `A` inside a longer prediction may be the article, so it is ignored there.
    """
    words = _MARKS.sub(" ", text).split()
    if len(words) == 1 and words[0].upper() in letters(choices):
        return words[0].upper()
    named = {word for word in words if word in letters(choices)}
    if len(named) == 1 and not (named == {"A"} and len(words) > _SHORT):
        return named.pop()
    return _named_text(text, choices) if not named or named == {"A"} else None


def read_llava_sqa(text: str, choices: Sequence[str]) -> str | None:
    """Parses a letter, "B. ...", or exactly one "The answer is B."."""
    if len(text) == 1 or text[1:3] == ". ":
        return _known(text[:1], choices)
    answers = _ANSWER_IS.findall(text)
    return _known(answers[0], choices) if len(answers) == 1 else None


def read_lmms_eval_sqa(text: str, choices: Sequence[str]) -> str | None:
    """Parses a letter in any case, or a capital letter and a full stop at the start."""
    if len(text) == 1:
        return _known(text.upper(), choices)
    return _known(text[0], choices) if text[1:2] == "." and text[0].isupper() else None


def read_first_character(text: str, choices: Sequence[str]) -> str | None:
    """Parses the first character of the stripped prediction."""
    return _known(text.strip()[:1], choices)


def read_paligemma_sqa(text: str, choices: Sequence[str]) -> str | None:
    """Parses "the answer is b." at the start, in any case."""
    match = re.match(r"the answer is ([a-z])\.", text.lower())
    return _known(match.group(1).upper(), choices) if match else None


def target_letter(sample: Sample, choices: Sequence[str]) -> str | None:
    """Returns the letter of the correct option; None if the sample's answer names no option."""
    if not sample.answers:
        return None
    answer = sample.answers[0].strip()
    if len(answer) == 1 and answer.upper() in letters(choices):
        return answer.upper()
    if answer in choices:
        return letters(choices)[list(choices).index(answer)]
    return read_paligemma_sqa(answer, choices)


def judge_choice(read: Reader, prediction: str, sample: Sample, metric: str) -> Judgement:
    """Scores whether a prediction names the correct option."""
    choices = needed(sample, "choices", list, metric)
    target = target_letter(sample, choices)
    if target is None:
        return UNSCORED
    given = read(prediction, choices)
    return UNPARSED if given is None else Judgement(float(given == target))


def _known(letter: str, choices: Sequence[str]) -> str | None:
    return letter if letter and letter in letters(choices) else None


def _named_text(text: str, choices: Sequence[str]) -> str | None:
    lowered = text.lower()
    named = [
        letter
        for letter, choice in zip(letters(choices), choices, strict=True)
        if choice.strip() and choice.strip().lower() in lowered
    ]
    return named[0] if len(named) == 1 else None


def _metric(variant: str, read: Reader) -> PerSampleMetric:
    return PerSampleMetric(
        "multiple_choice",
        variant,
        lambda prediction, sample: judge_choice(read, prediction, sample, "multiple_choice"),
        by_metadata("category"),
    )


MULTIPLE_CHOICE = variants(
    _metric(variant, read)
    for variant, read in (
        ("option", read_option),
        ("llava_sqa", read_llava_sqa),
        ("lmms_eval_sqa", read_lmms_eval_sqa),
        ("first_character", read_first_character),
        ("paligemma_sqa", read_paligemma_sqa),
    )
)
