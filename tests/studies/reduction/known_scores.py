"""Evaluations whose answers are made up, so that what a study says of them is known."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from parcelray.datasets.sample import Sample
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, score_splits
from parcelray.evaluation.scoring.summary import Summary


def samples(tasks: Sequence[str], family: str = "general", benchmark: str = "known") -> list[Sample]:
    """One question per task, each of a scene of its own; the right answer is `yes`."""
    return [
        Sample(f"{family}-{place}", benchmark, family, task, (), "is it", ("yes",), scene=f"{family}-{place}")
        for place, task in enumerate(tasks)
    ]


def summary(asked: Sequence[Sample], right: Mapping[int, Sequence[bool]]) -> Summary:
    """An evaluation that answered some of the questions right, by budget."""
    answers = {budget: [GivenAnswer("yes" if each else "no") for each in given] for budget, given in right.items()}
    splits = score_splits(asked, answers, ScoringRules(split_of=lambda sample: f"{sample.benchmark}/{sample.family}"))
    evaluation = cast(Any, SimpleNamespace(budgets=tuple(sorted(right)), model="known"))
    return Summary(evaluation, splits, "known", max(right), {}, 5.0)
