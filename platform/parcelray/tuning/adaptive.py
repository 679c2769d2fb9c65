"""Budgets chosen per image and question on the answers of a split search: each budget at the split that the search chose for it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from parcelray.errors import UserError
from parcelray.evaluation.adaptive.adaptive_budget import BEFORE, FIXED, AdaptiveStudy
from parcelray.evaluation.adaptive.budget_policies import best_mixture
from parcelray.evaluation.adaptive.study import study_answers
from parcelray.evaluation.inputs import open_model
from parcelray.evaluation.plan import connector_at
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.models.vlm import config_of
from parcelray.tuning.evaluate_trial import EvaluatedPoint, WarmEvaluator

_PLACES = 25
"""On the line of mixtures."""


def study_split_search(points: Mapping[int, EvaluatedPoint], evaluator: WarmEvaluator, metric: str) -> AdaptiveStudy:
    """The study of adaptive budgets without one more answer: only the signals of images and questions are read.

    Args:
        points: by budget, the evaluation of its chosen split.
        evaluator: of the search.
        metric: `score` or `retention`, which becomes the score of the study.

    Raises:
        UserError: see `study_answers`.
    """
    path = evaluator.models[evaluator.job.model.reference].checkpoint.path
    splits = _at_all_budgets(points)
    if metric == "retention":
        splits = _as_retention(splits, evaluator)
    config = config_of(path)
    connectors = {budget: connector_at(point.job, config, budget) for budget, point in sorted(points.items())}
    return study_answers(evaluator.job, splits, open_model(str(path), None), connectors)


def frontier_curves(study: AdaptiveStudy) -> dict[str, list[tuple[float, float]]]:
    """For the frontier of the search: visual tokens of all passes and the study's score, of predictor, escalation, and what any of them has to beat."""
    fixed = [(point.spent.tokens.value, point.spent.score.value) for point in study.curve(FIXED)]
    tokens_B, scores_B = np.array(fixed).T
    places = np.geomspace(tokens_B.min(), tokens_B.max(), _PLACES)
    mixed = best_mixture(places, np.tile(tokens_B[:, None], len(places)), np.tile(scores_B[:, None], len(places)))
    curves = {"mixture of the chosen splits": list(zip(places.tolist(), mixed.tolist(), strict=True))}
    for label, method in (("budget by predictor", BEFORE), (study.escalation, study.escalation)):
        curves[label] = [(point.spent.tokens.value, point.spent.score.value) for point in study.curve(method)]
    return curves


def _at_all_budgets(points: Mapping[int, EvaluatedPoint]) -> list[SplitScores]:
    """The splits of one point with the answers and scores of all; every point asked the same questions."""
    named = {budget: {split.name: split for split in point.splits} for budget, point in points.items()}
    return [
        replace(
            split,
            answers={budget: splits[split.name].answers[budget] for budget, splits in named.items()},
            scores={budget: splits[split.name].scores[budget] for budget, splits in named.items()},
        )
        for split in next(iter(points.values())).splits
    ]


def _as_retention(splits: Sequence[SplitScores], evaluator: WarmEvaluator) -> list[SplitScores]:
    """The splits on the scale of what they keep of the reference; as everywhere, without those where it scores 0."""
    reference, budget = evaluator.reference
    full = {split.name: split.scores[budget].estimate.value for split in reference}
    kept = [
        replace(split, scale=100 * split.scale / full[split.name]) for split in splits if full.get(split.name, 0) > 0
    ]
    if not kept:
        raise UserError(
            "The reference scores 0 on every split, so nothing can be kept of it; ask more questions, or search by"
            " score."
        )
    return kept
