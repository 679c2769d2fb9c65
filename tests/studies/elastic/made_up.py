"""Scores of elastic systems with a chosen number of right answers, without models."""

import functools
from collections.abc import Mapping

from parcelray.datasets.sample import Sample
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, SplitScores, score_splits
from parcelray.studies.elastic.results import ElasticResults

FAMILIES = ("general", "video")
BUDGETS = (16, 24, 32, 48, 64, 96, 128, 192, 256)
QUESTIONS = 200


def made_splits(right: Mapping[int, int]) -> list[SplitScores]:
    """Scores of one model, see `_made_splits`."""
    return _made_splits(tuple(right.items()))


@functools.cache
def _made_splits(right: tuple[tuple[int, int], ...]) -> list[SplitScores]:
    """Scores of one model: at each budget, the first `right` of `QUESTIONS` questions per family are right."""
    samples = [
        Sample(f"{family}-{index}", "mini", family, "t", (), "?", ("x",), scene=f"{family}-{index}")
        for family in FAMILIES
        for index in range(QUESTIONS)
    ]
    answers = {
        budget: [GivenAnswer("x" if index < number else "y") for _ in FAMILIES for index in range(QUESTIONS)]
        for budget, number in right
    }
    return score_splits(samples, answers, ScoringRules(split_of=lambda sample: f"mini/{sample.family}"))


def made_results(seeds: int = 2, step: int = 1, **changes: Mapping[int, int]) -> ElasticResults:
    """Results of all systems.

    Args:
        seeds: number of seeds.
        step: number of right answers per family that each seed has more than the one before it.
        **changes: number of right answers by budget, for systems that differ from the default.
    """
    right: dict[str, Mapping[int, int]] = {
        "vanilla": {0: 10, 256: 100},
        "parcel": dict.fromkeys(BUDGETS, 96),
        "m3": {16: 50, 64: 60, 256: 98},
        "mqt": dict.fromkeys(BUDGETS, 40),
        "mqt_local": dict.fromkeys(BUDGETS, 94),
    }
    return ElasticResults(
        {
            system: [
                made_splits({budget: number + step * seed for budget, number in row.items()}) for seed in range(seeds)
            ]
            for system, row in (right | changes).items()
        },
        BUDGETS,
    )
