"""Exact match with any acceptable answer.

Variants:
    lenient: case, spacing and a full stop at the end are ignored (the mini suite, NLVR).
    raw: equal strings (big_vision).
    lower: equal in lower case (big_vision with `to_lower`: OCR-VQA, RSVQA).
    lmms_eval: case and ASCII punctuation are ignored, surrounding spaces are not (its GQA).
    vlmevalkit: equal after stripping, in lower case.

Metadata read: `language` (optional; sub-scores, for xGQA and MaRVL).
"""

import string
from collections.abc import Callable

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, by_metadata, variants
from parcelray.datasets.sample import Sample

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Returns the text in lower case, with single spaces and without a full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def as_is(text: str) -> str:
    """Returns the text unchanged."""
    return text


def without_punctuation(text: str) -> str:
    """Returns the text in lower case without ASCII punctuation; spaces stay."""
    return text.lower().translate(_NO_PUNCTUATION)


def stripped(text: str) -> str:
    """Returns the text in lower case without surrounding spaces."""
    return text.strip().lower()


def matcher(text: Callable[[str], str]) -> Callable[[str, Sample], Judgement]:
    """Makes a judge by equality after normalising both sides. A sample without answers is unscored."""

    def judge(prediction: str, sample: Sample) -> Judgement:
        if not sample.answers:
            return UNSCORED
        return Judgement(float(text(prediction) in {text(answer) for answer in sample.answers}))

    return judge


EXACT_MATCH = variants(
    PerSampleMetric("exact_match", variant, matcher(text), by_metadata("language"))
    for variant, text in (
        ("lenient", normalize),
        ("raw", as_is),
        ("lower", str.lower),
        ("lmms_eval", without_punctuation),
        ("vlmevalkit", stripped),
    )
)
