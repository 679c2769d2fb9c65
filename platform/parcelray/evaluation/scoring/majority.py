"""The majority baseline, which always gives the most frequent answer of the task in the training data."""

import functools
from collections import Counter
from collections.abc import Sequence

from parcelray.benchmarks.training_data import training_source
from parcelray.config.data import DataConfig
from parcelray.config.evaluate import BLIND
from parcelray.datasets.source import BadRowsError
from parcelray.evaluation.scoring.split_scores import GivenAnswer, SplitScores, score_splits

_SAMPLES = 2000
"""Number of training samples whose answers are counted."""


def majority_scores(data: DataConfig, splits: Sequence[SplitScores], image_size: int) -> list[SplitScores]:
    """Scores the baseline on the samples of an evaluation, at the budget of the blind baseline.

    Args:
        data: the training data of the model.
        splits: scores of the evaluation.
        image_size: side of the training images, pixels.
    """
    answers = dict(_answers(data, image_size))
    samples = [sample for split in splits for sample in split.samples]
    if not samples:
        return []
    return score_splits(
        samples, {BLIND: [GivenAnswer(answers.get(sample.task, "")) for sample in samples]}, splits[0].rules
    )


@functools.lru_cache(maxsize=8)
def _answers(data: DataConfig, image_size: int) -> tuple[tuple[str, str], ...]:
    source = training_source(data, image_size)
    counts: dict[str, Counter[str]] = {}
    for group in source.groups:
        share = min(group.size or _SAMPLES, max(1, round(_SAMPLES * group.weight)))
        for index in range(share):
            try:
                sample = source.get(group.name, index)
            except BadRowsError:
                continue
            counts.setdefault(sample.task, Counter())[sample.answers[0]] += 1
    return tuple((task, counter.most_common(1)[0][0]) for task, counter in counts.items())
