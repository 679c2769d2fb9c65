"""How long one question takes alone, at several budgets of one model."""

import time
from collections.abc import Sequence

import numpy as np

from parcelray.data.sample import Sample
from parcelray.evaluation.predictor import Predictor

_PERCENTILE = 95


def answer_p95_ms(predictor: Predictor, samples: Sequence[Sample], budgets: Sequence[int]) -> dict[int, float]:
    """95th percentile of the time from encoded images to the answer, milliseconds, by budget.

    Budgets take turns on each question, so that what else the machine does meets all of them alike.

    Args:
        predictor: of the model.
        samples: the questions; the first is answered once more before, at every budget, and not timed.
        budgets: visual tokens per image.
    """
    for budget in budgets:
        predictor.generate(samples[:1], num_visual_tokens=budget)
    times: dict[int, list[float]] = {budget: [] for budget in budgets}
    for sample in samples:
        for budget in budgets:
            began = time.perf_counter()
            predictor.generate([sample], num_visual_tokens=budget)
            times[budget].append(1000 * (time.perf_counter() - began))
    return {budget: float(np.percentile(each, _PERCENTILE)) for budget, each in times.items()}
