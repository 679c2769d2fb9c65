"""VizWiz-VQA: VQA accuracy, with separate scores for `unanswerable` (Gurari et al., CVPR 2018).

Variants:
    m4c: leave-one-out with EvalAI's normalisation (its server, lmms-eval, LLaVA).
    official: leave-one-out as VQAv2's scorer does it.
    big_vision: min(equal strings / 3, 1) on raw text, without empty human answers (PaliGemma).

Always answering `unanswerable` raises the score. Two sub-scores therefore show it: `unanswerable_rate` is the share of
such predictions, and `answerable` is the accuracy on questions that most annotators could answer.

Metadata read: `answer_type` (optional; sub-scores).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parcelray.benchmarks.metrics import vqa_accuracy
from parcelray.benchmarks.metrics.base import (
    Judgement,
    MetricResult,
    PerSampleMetric,
    by_metadata,
    scored_mean,
    variants,
)
from parcelray.benchmarks.metrics.vqa_accuracy import m4c_pre_step, normalize
from parcelray.datasets.sample import Sample

_UNANSWERABLE = "unanswerable"


@dataclass(frozen=True)
class VizWiz:
    """VQA accuracy, and the share of `unanswerable` among the predictions."""

    variant: str
    rule: Callable[[str, Sequence[str]], Judgement]
    name: str = "vizwiz"
    additive: bool = True
    paper_scale: float = 100.0

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        metric = PerSampleMetric(
            self.name,
            self.variant,
            lambda prediction, sample: self.rule(prediction, sample.answers),
            by_metadata("answer_type"),
        )
        result = metric(predictions, samples)
        answerable = [
            value for value, sample in zip(result.values, samples, strict=True) if not _unanswerable_for_most(sample)
        ]
        unanswerable = [float(_is_unanswerable(prediction)) for prediction in predictions]
        return result._replace(
            totals=result.totals
            | {"answerable": scored_mean(answerable), "unanswerable_rate": scored_mean(unanswerable)}
        )


def _big_vision(prediction: str, answers: Sequence[str]) -> Judgement:
    return vqa_accuracy.big_vision(prediction, [answer for answer in answers if answer])


def _is_unanswerable(text: str) -> bool:
    return normalize(m4c_pre_step(text)) == _UNANSWERABLE


def _unanswerable_for_most(sample: Sample) -> bool:
    return 2 * sum(_is_unanswerable(answer) for answer in sample.answers) > len(sample.answers)


VIZWIZ = variants(
    (VizWiz("m4c", vqa_accuracy.m4c), VizWiz("official", vqa_accuracy.official), VizWiz("big_vision", _big_vision))
)
