"""What a blind guesser scores: the most frequent training answer of each task."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from parcelray.data.sample import Sample


def majority_answers(train_samples: Iterable[Sample]) -> dict[str, str]:
    """The most frequent first answer of each task; ties go to the answer that comes first in the alphabet."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sample in train_samples:
        counts[sample.task][sample.answers[0]] += 1
    return {task: min(counter, key=lambda answer: (-counter[answer], answer)) for task, counter in counts.items()}


def baselines(samples: Iterable[Sample], majority: dict[str, str]) -> dict[str, float]:
    """Share of each task's samples for which the majority answer is acceptable, by exact match, 0 to 1.

    A task that the training samples did not have scores 0. For grounding this is an exact hit of all four tokens, not an IoU.
    """
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        hits[sample.task].append(majority.get(sample.task) in sample.answers)
    return {task: sum(values) / len(values) for task, values in hits.items()}
