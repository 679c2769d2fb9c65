"""Multiple-choice accuracy: parses which option a prediction names.

Options are named by the letters A to Z, by position. An empty choice is no option, and the letters of the others stay:
of the choices x, (empty), y, the letters are A and C. A prediction that no rule can parse is wrong and counted as
unparsed. No option is drawn at random.

Variants (parsers):
    option: VLMEvalKit's rules before it calls a judge model (`can_infer_option`, then `can_infer_text`). Each of
        . ( ) [ ] , : ; ! * # { } becomes a space; exactly one letter may be a word of the prediction, and it must first
        occur within the last four words. Otherwise the text of exactly one option must occur in the prediction, in any
        case, and the prediction must not be longer than all option texts twice.
    llava_sqa: the whole prediction is a letter, or starts with "B. ", or contains exactly one "The answer is B" that
        any character follows (LLaVA on ScienceQA; the full stop of its pattern is not escaped).
    lmms_eval_sqa: the whole prediction is a letter in any case, or starts with a capital letter and a full stop.
    first_character: the first character of the stripped prediction, in any case (lmms-eval on SEED-Bench).
    paligemma_sqa: the prediction in lower case starts with "the answer is b." (big_vision on ScienceQA).

Departures of `option` from VLMEvalKit: if the texts of several options occur and the whole prediction is one of them,
that option is meant ("caterpillar" beside the option "cat"). Its sentences of refusal and its letter Z for a refusal
are not special.

Metadata read: `choices` (required; option texts in order), `target_index` (optional; position of the correct option,
from 0), `category` (optional; sub-scores). Without `target_index`, the first answer of a sample is the letter of the
correct option, else its text, or the sentence "The answer is B.".
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence

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
from parcelray.errors import UserError

Options = Mapping[str, str]
"""Texts of the options by letter."""

Reader = Callable[[str, Options], str | None]
"""Maps a prediction and the options to a letter; None if it cannot be parsed."""

LETTERS = string.ascii_uppercase
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
# The full stop is not escaped in the official pattern either.
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
_LLAVA_SQA_LETTERS = "ABCDE"


def options(choices: Sequence[object]) -> dict[str, str]:
    """Returns the texts of the choices that are not empty, by the letter of their position.

    Raises:
        ValueError: there are more choices than letters.
    """
    if len(choices) > len(LETTERS):
        raise ValueError(f"{len(choices)} choices; the letters A to Z name at most {len(LETTERS)}")
    texts = ("" if choice is None else str(choice) for choice in choices)
    return {letter: text for letter, text in zip(LETTERS, texts, strict=False) if text.strip()}


def read_option(text: str, options: Options) -> str | None:
    """Parses the only letter among the words, else the text of exactly one option."""
    words = text.translate(_MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    return _named_text(text.lower(), {letter: choice.lower() for letter, choice in options.items()})


def read_llava_sqa(text: str, options: Options) -> str | None:
    """Parses a letter, "B. ...", or exactly one "The answer is B."."""
    letters = {*_LLAVA_SQA_LETTERS, *options}
    if text in letters:
        return _known(text, options)
    if text[:1] in letters and text[1:3] == ". ":
        return _known(text[0], options)
    answers = _ANSWER_IS.findall(text)
    return _known(answers[0], options) if len(answers) == 1 else None


def read_lmms_eval_sqa(text: str, options: Options) -> str | None:
    """Parses a letter in any case, or a capital letter and a full stop at the start."""
    if len(text) == 1:
        return _known(text.upper(), options)
    return _known(text[0], options) if text[1:2] == "." else None


def read_first_character(text: str, options: Options) -> str | None:
    """Parses the first character of the stripped prediction, in any case."""
    return _known(text.strip()[:1].upper(), options)


def read_paligemma_sqa(text: str, options: Options) -> str | None:
    """Parses "the answer is b." at the start, in any case."""
    match = re.match(r"the answer is ([a-z])\.", text.lower())
    return _known(match.group(1).upper(), options) if match else None


def judge_choice(read: Reader, prediction: str, sample: Sample, metric: str) -> Judgement:
    """Scores whether a prediction names the correct option.

    Raises:
        UserError: the sample has no choices, or more choices than there are letters.
    """
    try:
        named = options(needed(sample, "choices", list, metric))
    except ValueError as error:
        raise UserError(
            f"The metric {metric} cannot score sample {sample.id!r} of {sample.benchmark}: it has {error}; give fewer"
            " choices, or choose a metric that compares texts, such as exact_match."
        ) from None
    target = target_letter(sample, named)
    if target is None:
        return UNSCORED
    given = read(prediction, named)
    return UNPARSED if given is None else Judgement(float(given == target))


def target_letter(sample: Sample, options: Options) -> str | None:
    """Returns the letter of the correct option; None if the sample names no option."""
    index = sample.metadata.get("target_index")
    if isinstance(index, int):
        return _known(LETTERS[index : index + 1], options)
    if not sample.answers:
        return None
    answer = sample.answers[0].strip()
    by_text = next((letter for letter, choice in options.items() if choice.strip() == answer), None)
    return _known(answer.upper(), options) or by_text or read_paligemma_sqa(answer, options)


def _known(letter: str, options: Options) -> str | None:
    return letter if letter in options else None


def _named_text(text: str, options: Options) -> str | None:
    """Returns the option whose text occurs in the prediction; both are in lower case."""
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, choice in options.items() if choice in text]
    if len(named) > 1:
        named = [letter for letter in named if options[letter].strip() == text.strip()]
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
