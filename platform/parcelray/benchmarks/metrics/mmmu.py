"""MMMU (Yue et al., CVPR 2024): micro accuracy over multiple-choice and open questions.

A multiple-choice answer is read by rule (a letter, then the text of exactly one option); where the official script
draws an option at random, the answer is wrong here and counted. An open answer is right if a normalised right answer is
among what it says: numbers are compared after rounding to two places, texts must occur in it.

Sub-scores: `multiple_choice`, `open`, and one per category.

Metadata read: `choices` (optional; none or empty: an open question), `category` (optional). An open question's first
answer may be a list of right ones written in Python.
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
    right = [text for answer in sample.answers for text in _several(answer) if text.strip()]
    return Judgement(float(any(_says(prediction, text) for text in right))) if right else UNSCORED


def _several(answer: str) -> list[str]:
    if answer.startswith("["):
        try:
            return [str(part) for part in ast.literal_eval(answer)]
        except (ValueError, SyntaxError):
            pass
    return [answer]


def _says(prediction: str, right: str) -> bool:
    number = _number(right)
    if number is not None:
        return any(_number(found) == number for found in _NUMBER.findall(prediction))
    return right.strip().lower() in prediction.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.strip().replace(",", ""))
    except ValueError:
        return None
    return round(value, 2) if math.isfinite(value) else None


def _groups(sample: Sample) -> tuple[str, ...]:
    return ("multiple_choice" if sample.metadata.get("choices") else "open", *by_metadata("category")(sample))


MMMU = variants((PerSampleMetric("mmmu", "official", _judge, _groups),))
