"""Average normalised Levenshtein similarity (Biten et al., ICCV 2019, equation 1).

s = 1 - NL if NL < 0.5 else 0, with NL = edit distance / longer length; a question's score is the best over its answers.

Variants:
    strict: NL < 0.5 as in the paper and big_vision, on lower-cased text; an empty answer is matched only by an empty
        prediction.
    permuted: the same, where an answer with ", " may come in any order of its parts (big_vision on InfographicVQA).
    lmms_eval: NL = 0.5 still scores 0.5, and the distance on lower-cased text with squeezed spaces is divided by the
        lengths of the raw strings (lmms-eval, VLMEvalKit).
"""

import itertools
from collections.abc import Callable

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, variants
from parcelray.datasets.sample import Sample

_THRESHOLD = 0.5


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions, each 1."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def strict(prediction: str, answer: str) -> float:
    """The paper's rule on lower-cased text."""
    given, target = prediction.lower(), answer.lower()
    if not target:
        return float(not given)
    distance = edit_distance(given, target) / max(len(given), len(target))
    return 1.0 - distance if distance < _THRESHOLD else 0.0


def lmms_eval(prediction: str, answer: str) -> float:
    """Squeezed text over raw lengths, the threshold included."""
    longest = max(len(prediction), len(answer))
    if not longest:
        return 1.0
    similarity = 1.0 - edit_distance(_squeezed(prediction), _squeezed(answer)) / longest
    return similarity if similarity >= _THRESHOLD else 0.0


def permuted(prediction: str, answer: str) -> float:
    """The best over all orders of the parts of an answer with several spans."""
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
