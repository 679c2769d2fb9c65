"""ChartQA's relaxed accuracy: numbers within 5 %, other answers exactly (Masry et al., ACL Findings 2022, section 5.1).

Both sides are lower-cased and parsed as numbers (`12%` is 0.12). If both are numbers and the target is not 0, the
prediction is correct if |p - t| / |t| <= 0.05. Otherwise the strings must be equal. Commas, currency signs and spaces
are not stripped. There is one variant: big_vision and lmms-eval agree.

Metadata read: `type` (optional; sub-scores for ChartQA's human and augmented questions; papers report their mean as
overall score).
"""

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, by_metadata, variants
from parcelray.datasets.sample import Sample

_TOLERANCE = 0.05


def relaxed_match(prediction: str, target: str) -> bool:
    """Whether a prediction equals the target, within 5 % for numbers."""
    given, wanted = prediction.lower(), target.lower()
    number, goal = _number(given), _number(wanted)
    if number is not None and goal:
        return abs(number - goal) / abs(goal) <= _TOLERANCE
    return given == wanted


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _judge(prediction: str, sample: Sample) -> Judgement:
    if not sample.answers:
        return UNSCORED
    return Judgement(float(any(relaxed_match(prediction, answer) for answer in sample.answers)))


RELAXED_ACCURACY = variants((PerSampleMetric("relaxed_accuracy", "official", _judge, by_metadata("type")),))
