"""The score that no model is needed for: a random choice, or always the most frequent answer."""

import math
from collections import Counter
from typing import NamedTuple

from parcelray.config.evaluate import BLIND
from parcelray.evaluation.scoring.split_scores import GivenAnswer, SplitScores, score_splits


class Chance(NamedTuple):
    """The score of answers that depend on neither image nor question, on the scale of the split's score."""

    value: float
    answer: str | None
    """The answer that is always given; None: a random choice."""


def chance(split: SplitScores) -> Chance | None:
    """Returns the chance score of a split.

    With choices it is the expected score of a random choice. Without, it is the score of the most frequent reference
    answer of the evaluated samples.

    Returns:
        None if the score is not a mean over samples, or no reference answer occurs twice.
    """
    if not split.additive or not split.samples:
        return None
    choices = [[each for each in sample.metadata.get("choices") or () if str(each).strip()] for sample in split.samples]
    if all(len(each) > 1 for each in choices):
        return Chance(split.scale * sum(1 / len(each) for each in choices) / len(choices), None)
    counts = Counter(sample.answers[0] for sample in split.samples if sample.answers)
    answer, count = counts.most_common(1)[0] if counts else ("", 0)
    if count < 2:
        return None
    (scored,) = score_splits(split.samples, {BLIND: [GivenAnswer(answer)] * len(split.samples)}, split.rules)
    value = scored.scores[BLIND].estimate.value
    return None if math.isnan(value) else Chance(value, answer)
