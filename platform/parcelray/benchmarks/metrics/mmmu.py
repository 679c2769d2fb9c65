"""MMMU (Yue et al., CVPR 2024): micro accuracy over multiple-choice and open questions, by its `eval_utils`.

A multiple-choice prediction loses the marks , . ! ? ; : ' at its ends. Then the letters in brackets count, else the
letters between spaces, else (in predictions of more than five words) the texts of the options. Of several, the last
position wins.

An open prediction is searched in its key parts only: the shortest tail of each line behind `could be`, `so`, `is`,
`thus`, `therefore`, `final`, `answer` or `result` (in the last line also `=`); the whole prediction if there is none.
Their numbers, rounded to two decimals, are compared with numeric answers. Other answers must occur in a key part; one
of a single character with a space in front of it or behind it.

Departures from the script:
    A multiple-choice prediction that no rule can parse is wrong and counted as unparsed; the script draws an option at
    random.
    A full stop in front of a digit stays at the start of an open prediction; the script strips it, so that ".5" counts
    as 5.

Sub-scores: `multiple_choice`, `open`, and one per category.

Metadata read: `choices` (optional; missing or empty: an open question), `target_index` and `category` (optional; see
`multiple_choice`). The first answer of an open question may be a Python list of correct answers.
"""

import ast
import re

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, by_metadata, variants
from parcelray.benchmarks.metrics.multiple_choice import Options, judge_choice
from parcelray.datasets.sample import Sample

_END_MARKS = tuple(",.!?;:'")
_MIN_WORDS = 6
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def read_mmmu(text: str, options: Options) -> str | None:
    """Parses the last letter in brackets, else the last one between spaces, else the option text that starts last."""
    for mark in _END_MARKS:
        text = text.strip(mark)
    text = f" {text} "
    searches = [(text, {letter: form.format(letter) for letter in options}) for form in ("({})", " {} ")]
    if len(text.split()) >= _MIN_WORDS:
        searches.append((text.lower(), {letter: choice.lower() for letter, choice in options.items()}))
    for searched, wanted in searches:
        positions = {letter: searched.rfind(part) for letter, part in wanted.items()}
        if max(positions.values(), default=-1) >= 0:
            return max(positions, key=positions.__getitem__)
    return None


def read_open(text: str) -> list[str | float]:
    """Returns the key parts of a prediction in lower case, and the numbers in them."""
    parts = _key_parts(text)
    numbers = [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    return [each for part in (*parts, *numbers) for each in _normalized(part)]


def _key_parts(text: str) -> list[str]:
    lines = _without_outer_stops(text.strip()).lower().split("\n")
    parts = []
    for number, line in enumerate(lines, 1):
        shortest = ""
        for indicator in (*_INDICATORS, "=") if number == len(lines) else _INDICATORS:
            if indicator in line:
                tail = line.split(indicator)[-1].strip()
                # An empty tail counts as none, as in the script: the next indicator replaces it.
                shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in _END_MARKS:
            parts.append(shortest)
    return parts or ["\n".join(lines)]


def _without_outer_stops(text: str) -> str:
    inner = text.strip(".")
    return f".{inner}" if text.startswith(".") and inner[:1].isdecimal() else inner


def _normalized(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _judge(prediction: str, sample: Sample) -> Judgement:
    if sample.metadata.get("choices"):
        return judge_choice(read_mmmu, prediction, sample, "mmmu")
    correct = [each for answer in sample.answers for text in _parse_answers(answer) for each in _normalized(text)]
    correct = [each for each in correct if each != ""]
    if not correct:
        return UNSCORED
    return Judgement(float(any(_is_correct(given, correct) for given in read_open(prediction))))


def _is_correct(given: str | float, correct: list[str | float]) -> bool:
    if isinstance(given, str):
        return any(isinstance(each, str) and each in given for each in correct)
    return given in correct


def _parse_answers(answer: str) -> list[str]:
    if answer.startswith("["):
        try:
            return [str(part) for part in ast.literal_eval(answer)]
        except (ValueError, SyntaxError):
            pass
    return [answer]


def _groups(sample: Sample) -> tuple[str, ...]:
    return ("multiple_choice" if sample.metadata.get("choices") else "open", *by_metadata("category")(sample))


MMMU = variants((PerSampleMetric("mmmu", "official", _judge, _groups),))
