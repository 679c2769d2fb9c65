"""How long one question takes alone, at several budgets of one model."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from parcelray.datasets.sample import Sample

_PERCENTILE = 95


def answer_p95_ms(
    answer: Callable[[Sample, int], object], samples: Sequence[Sample], budgets: Sequence[int]
) -> dict[int, float]:
    """95th percentile of the time that an answer takes, milliseconds, by budget.

    Budgets take turns on each question, so that what else the machine does meets all of them alike.

    Args:
        answer: answers a sample at a number of visual tokens, from encoded images on.
        samples: the questions; the first is answered once more before, at every budget, and not timed.
        budgets: visual tokens per image.
    """
    for budget in budgets:
        answer(samples[0], budget)
    times: dict[int, list[float]] = {budget: [] for budget in budgets}
    for sample in samples:
        for budget in budgets:
            began = time.perf_counter()
            answer(sample, budget)
            times[budget].append(1000 * (time.perf_counter() - began))
    return {budget: float(np.percentile(each, _PERCENTILE)) for budget, each in times.items()}
