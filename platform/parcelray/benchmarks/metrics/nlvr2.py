"""NLVR2 accuracy: whether a sentence is true of a pair of images (Suhr et al., ACL 2019).

Variants:
    words: `true` or `yes` against `false` or `no`, in any case, with or without a full stop. Anything else is wrong and
        counted as unparsed.
    raw: the prediction must equal the answer string (`True`, `False`; big_vision).

Sub-score `consistency`: share of sentences that are judged correctly for all their images (see `sentence_of`).

Metadata read: `identifier` (optional; the corpus's identifier of the example), `language` (optional; sub-scores, for
MaRVL).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from parcelray.benchmarks.metrics.base import (
    UNPARSED,
    UNSCORED,
    Judgement,
    MetricResult,
    PerSampleMetric,
    by_metadata,
    variants,
)
from parcelray.datasets.sample import Sample

_MEANINGS = {"true": True, "yes": True, "false": False, "no": False}


def read_truth(text: str) -> bool | None:
    """Parses true or false; None if the text is neither."""
    return _MEANINGS.get(text.strip().rstrip(".").lower())


def sentence_of(identifier: str) -> str:
    """Returns the part of an identifier that all examples of a sentence share.

    NLVR (`3776-0`: sentence and picture) groups by the first part, and NLVR2 (`test1-0-1-0`: split, set, pair and
    sentence) drops the third, as the evaluation scripts of the two corpora do. Any other identifier is a sentence.
    """
    parts = identifier.split("-")
    if len(parts) == 2:
        return parts[0]
    return "-".join((*parts[:2], parts[3])) if len(parts) == 4 else identifier


def consistency(scores: Iterable[tuple[str, float]]) -> float:
    """Returns the share of sentences whose images are all correct (NLVR; Suhr et al., ACL 2017).

    Args:
        scores: pairs of a sentence and the score of one of its images, in any order. NaN counts as not correct.

    Returns:
        A value from 0 to 1; NaN without scores.
    """
    correct: dict[str, bool] = {}
    for sentence, value in scores:
        correct[sentence] = correct.get(sentence, True) and value == 1.0
    return sum(correct.values()) / len(correct) if correct else float("nan")


@dataclass(frozen=True)
class Nlvr2:
    """Accuracy over image pairs, with consistency as sub-score."""

    variant: str
    judge: Callable[[str, Sample], Judgement]
    name: str = "nlvr2"
    additive: bool = True
    paper_scale: float = 100.0

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        result = PerSampleMetric(self.name, self.variant, self.judge, by_metadata("language"))(predictions, samples)
        named = [
            (sentence_of(str(sample.metadata["identifier"])), value)
            for value, sample in zip(result.values, samples, strict=True)
            if "identifier" in sample.metadata
        ]
        return result._replace(totals=result.totals | {"consistency": consistency(named)}) if named else result


def _words(prediction: str, sample: Sample) -> Judgement:
    target = read_truth(sample.answers[0]) if sample.answers else None
    if target is None:
        return UNSCORED
    given = read_truth(prediction)
    return UNPARSED if given is None else Judgement(float(given == target))


def _raw(prediction: str, sample: Sample) -> Judgement:
    if not sample.answers:
        return UNSCORED
    right = prediction == sample.answers[0]
    return Judgement(float(right), parsed=right or read_truth(prediction) is not None)


NLVR2 = variants((Nlvr2("words", _words), Nlvr2("raw", _raw)))
