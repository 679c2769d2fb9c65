"""Counting accuracy: number words up to twenty as digits on both sides, then exact match (TallyQA, CountBenchQA; big_vision `tallyqa`).

Variants:
    official: as above; nothing is stripped.
    lenient: surrounding spaces and a full stop at the end do not count.

An answer that holds no number is wrong like any other and counted as unparsed.

Metadata read: `issimple` (optional; 1 simple, 0 complex: sub-scores).
"""

from collections.abc import Callable

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, variants
from parcelray.benchmarks.metrics.exact_match import as_is, normalize
from parcelray.benchmarks.metrics.vqa_accuracy import NUMERALS
from parcelray.datasets.sample import Sample


def numeral(text: str) -> str:
    """A number word as digits; any other text as it is."""
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
    names = {1: "simple", 0: "complex"}
    kind = sample.metadata.get("issimple")
    return (names[kind],) if kind in names else ()


COUNTING = variants(
    PerSampleMetric("counting", variant, _judge(clean), _groups)
    for variant, clean in (("official", as_is), ("lenient", normalize))
)
