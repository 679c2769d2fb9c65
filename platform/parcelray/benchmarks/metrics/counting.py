"""Counting accuracy: exact match after number words up to twenty become digits on both sides.

Used for TallyQA and CountBenchQA (big_vision `tallyqa`).

Variants:
    official: as above, without stripping.
    lenient: surrounding spaces and a full stop at the end are ignored.

A prediction that contains no number is wrong and counted as unparsed.

Metadata read: `issimple` (optional; 1 or true: simple, 0 or false: complex; these are sub-scores).
"""

from collections.abc import Callable

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, variants, wrong_metadata
from parcelray.benchmarks.metrics.exact_match import as_is, normalize
from parcelray.benchmarks.metrics.vqa_accuracy import NUMERALS
from parcelray.datasets.sample import Sample


def numeral(text: str) -> str:
    """Returns a number word as digits, and any other text unchanged."""
    return NUMERALS.get(text.lower(), text)


def _judge(clean: Callable[[str], str]) -> Callable[[str, Sample], Judgement]:
    def judge(prediction: str, sample: Sample) -> Judgement:
        if not sample.answers:
            return UNSCORED
        given = numeral(clean(prediction))
        right = given in {numeral(clean(answer)) for answer in sample.answers}
        return Judgement(float(right), parsed=right or given.isdecimal())

    return judge


def _groups(sample: Sample) -> tuple[str, ...]:
    kind = sample.metadata.get("issimple")
    if kind is None:
        return ()
    if kind not in (0, 1):
        raise wrong_metadata(sample, "issimple", "1 (simple), 0 (complex) or null", "counting")
    return ("simple" if kind else "complex",)


COUNTING = variants(
    PerSampleMetric("counting", variant, _judge(clean), _groups)
    for variant, clean in (("official", as_is), ("lenient", normalize))
)
