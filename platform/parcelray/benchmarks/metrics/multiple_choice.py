"""Multiple choice: which option an answer names.

An answer that no rule can read is wrong and counted; nothing is drawn at random.

Variants (readers):
    option: a letter that stands alone, else the text of exactly one option (the rules of MMBench's scorer before its
        judge).
    llava_sqa: the whole answer is a letter, or starts with "B. ", or holds exactly one "The answer is B." (LLaVA on
        ScienceQA).
    lmms_eval_sqa: the whole answer is a letter in any case, or starts with a capital and a full stop.
    first_character: of the stripped answer (lmms-eval on SEED-Bench).
    paligemma_sqa: in lower case, it starts with "the answer is b." (big_vision on ScienceQA).

Metadata read: `choices`, the option texts in order (needed); `category` (optional; sub-scores). The sample's first
answer is the right option's letter, its text, or the sentence "The answer is B.".
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
"""From an answer and the option texts to a letter; None: unreadable."""

_ANSWER_IS = re.compile(r"The answer is ([A-Z])\.")
_MARKS = re.compile(r"[.()\[\],:;!*#{}'\"]")
_SHORT = 3


def letters(choices: Sequence[str]) -> str:
    """The letters of the options, from A on."""
    return string.ascii_uppercase[: len(choices)]


def read_option(text: str, choices: Sequence[str]) -> str | None:
    """A letter that stands alone, else the text of exactly one option.

    `A` inside a longer answer may be the article, so it does not count there.
    """
    words = _MARKS.sub(" ", text).split()
    if len(words) == 1 and words[0].upper() in letters(choices):
        return words[0].upper()
    named = {word for word in words if word in letters(choices)}
    if len(named) == 1 and not (named == {"A"} and len(words) > _SHORT):
        return named.pop()
    return _named_text(text, choices) if not named or named == {"A"} else None


def read_llava_sqa(text: str, choices: Sequence[str]) -> str | None:
    """The letter, "B. ...", or exactly one "The answer is B."."""
    if len(text) == 1 or text[1:3] == ". ":
        return _known(text[:1], choices)
    found = _ANSWER_IS.findall(text)
    return _known(found[0], choices) if len(found) == 1 else None


def read_lmms_eval_sqa(text: str, choices: Sequence[str]) -> str | None:
    """The letter in any case, or a capital and a full stop first."""
    if len(text) == 1:
        return _known(text.upper(), choices)
    return _known(text[0], choices) if text[1:2] == "." and text[0].isupper() else None


def read_first_character(text: str, choices: Sequence[str]) -> str | None:
    """The first character of the stripped answer."""
    return _known(text.strip()[:1], choices)


def read_paligemma_sqa(text: str, choices: Sequence[str]) -> str | None:
    """The answer starts with "the answer is b." in any case."""
    found = re.match(r"the answer is ([a-z])\.", text.lower())
    return _known(found.group(1).upper(), choices) if found else None


def target_letter(sample: Sample, choices: Sequence[str]) -> str | None:
    """The right option's letter; None if the sample's answer names none."""
    if not sample.answers:
        return None
    answer = sample.answers[0].strip()
    if len(answer) == 1 and answer.upper() in letters(choices):
        return answer.upper()
    if answer in choices:
        return letters(choices)[list(choices).index(answer)]
    return read_paligemma_sqa(answer, choices)


def judge_choice(read: Reader, prediction: str, sample: Sample, metric: str) -> Judgement:
    """Whether an answer names the right option."""
    choices = needed(sample, "choices", list, metric)
    target = target_letter(sample, choices)
    if target is None:
        return UNSCORED
    given = read(prediction, choices)
    return UNPARSED if given is None else Judgement(float(given == target))


def _known(letter: str, choices: Sequence[str]) -> str | None:
    return letter if letter and letter in letters(choices) else None


def _named_text(text: str, choices: Sequence[str]) -> str | None:
    said = text.lower()
    found = [
        letter
        for letter, choice in zip(letters(choices), choices, strict=True)
        if choice.strip() and choice.strip().lower() in said
    ]
    return found[0] if len(found) == 1 else None


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
