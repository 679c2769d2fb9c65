"""Average normalised Levenshtein similarity (Biten et al., ICCV 2019, equation 1).

s = 1 - NL if NL < 0.5 else 0, with NL = edit distance / longer length. The score of a sample is the best over its
answers.

Variants:
    strict: NL < 0.5 as in the paper and big_vision, on lower-cased text. An empty answer matches only an empty
        prediction.
    permuted: like strict, but the parts of an answer with ", " may be in any order (big_vision on InfographicVQA).
    lmms_eval: NL = 0.5 scores 0.5. The distance is computed on lower-cased text with squeezed spaces, and divided by
        the length of the longer raw string (lmms-eval, VLMEvalKit).
"""

import itertools
from collections.abc import Callable

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, variants
from parcelray.datasets.sample import Sample

_THRESHOLD = 0.5


def edit_distance(first: str, second: str) -> int:
    """Returns the Levenshtein distance: insertions, deletions and substitutions cost 1 each."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def strict(prediction: str, answer: str) -> float:
    """Returns the similarity by the paper's rule on lower-cased text."""
    given, target = prediction.lower(), answer.lower()
    if not target:
        return float(not given)
    distance = edit_distance(given, target) / max(len(given), len(target))
    return 1.0 - distance if distance < _THRESHOLD else 0.0


def lmms_eval(prediction: str, answer: str) -> float:
    """Returns the similarity by the rule of lmms-eval: squeezed text, raw lengths, threshold included."""
    longest = max(len(prediction), len(answer))
    if not longest:
        return 1.0
    similarity = 1.0 - edit_distance(_squeezed(prediction), _squeezed(answer)) / longest
    return similarity if similarity >= _THRESHOLD else 0.0


def permuted(prediction: str, answer: str) -> float:
    """Returns the best similarity over all orders of the comma-separated parts of an answer."""
    return max(strict(prediction, ", ".join(parts)) for parts in set(itertools.permutations(answer.split(", "))))


def _squeezed(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _best(similarity: Callable[[str, str], float]) -> Callable[[str, Sample], Judgement]:
    def judge(prediction: str, sample: Sample) -> Judgement:
        if not sample.answers:
            return UNSCORED
        return Judgement(max(similarity(prediction, answer) for answer in sample.answers))

    return judge


ANLS = variants(
    PerSampleMetric("anls", variant, _best(similarity))
    for variant, similarity in (("strict", strict), ("permuted", permuted), ("lmms_eval", lmms_eval))
)
