"""MMMU (Yue et al., CVPR 2024): micro accuracy over multiple-choice and open questions.

A multiple-choice prediction is parsed by rule (a letter, then the text of exactly one option). The official script
draws an option at random where no rule applies; here such a prediction is wrong and counted as unparsed. An open
prediction is correct if it contains a correct answer: numbers are compared after rounding to two decimals, texts must
occur in the prediction.

Sub-scores: `multiple_choice`, `open`, and one per category.

Metadata read: `choices` (optional; missing or empty: an open question), `category` (optional). The first answer of an
open question may be a Python list of correct answers.
"""

import ast
import math
import re

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, by_metadata, variants
from parcelray.benchmarks.metrics.multiple_choice import judge_choice, read_option
from parcelray.datasets.sample import Sample

_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:[eE][+-]?\d+)?")


def _judge(prediction: str, sample: Sample) -> Judgement:
    if sample.metadata.get("choices"):
        return judge_choice(read_option, prediction, sample, "mmmu")
    correct = [text for answer in sample.answers for text in _parse_answers(answer) if text.strip()]
    return Judgement(float(any(_contains(prediction, text) for text in correct))) if correct else UNSCORED


def _parse_answers(answer: str) -> list[str]:
    if answer.startswith("["):
        try:
            return [str(part) for part in ast.literal_eval(answer)]
        except (ValueError, SyntaxError):
            pass
    return [answer]


def _contains(prediction: str, answer: str) -> bool:
    number = _number(answer)
    if number is not None:
        return any(_number(part) == number for part in _NUMBER.findall(prediction))
    return answer.strip().lower() in prediction.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.strip().replace(",", ""))
    except ValueError:
        return None
    return round(value, 2) if math.isfinite(value) else None


def _groups(sample: Sample) -> tuple[str, ...]:
    return ("multiple_choice" if sample.metadata.get("choices") else "open", *by_metadata("category")(sample))


MMMU = variants((PerSampleMetric("mmmu", "official", _judge, _groups),))
