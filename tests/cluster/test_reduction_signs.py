"""Failure signs are found where they are, and only there."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from parcelray.cluster.reduction_signs import describe, failure_signs
from parcelray.evaluation.aggregate import Frontier, FrontierPoint
from parcelray.evaluation.intervals import Interval
from parcelray.evaluation.split_scores import Estimate


def _point(method: str, tokens: int, text: float) -> FrontierPoint:
    value = Interval(text, text, text, 100)
    return FrontierPoint(method, tokens, value, None, {"resolution": value, "general": value}, 0)


def _summary(score: float) -> Any:
    noise = np.random.default_rng(0).normal(0, 0.5, 1000)
    return SimpleNamespace(budgets=(13,), mean_score=lambda budget: Estimate(score, score + noise * (score != 20), 100))


def test_each_sign_is_a_sentence() -> None:
    frontier = Frontier((_point("full", 256, 30), _point("cluster", 13, 20), _point("VisionZip", 13, 4), _point("VisionZip", 28, 4)), reference="full")
    found = {"spatial": _summary(20), "VisionZip": _summary(17), "PruMerge": _summary(19.9), "cluster": _summary(10)}
    signs = failure_signs(found, frontier, 256, {("random", 13): 3.5, ("random", 28): 0.4})
    assert len(signs) == 3
    assert signs[0] == "At 5% of the tokens resolution falls below half of its full score under 1 of 2 methods: VisionZip."
    assert signs[1].startswith("VisionZip loses to spatial sampling at 13 tokens by 3.0 points")
    assert signs[2].startswith("random at 13 tokens varies by 3.5 points")
    assert describe(signs).count("\n- ") == 3


def test_no_sign_is_said_so() -> None:
    frontier = Frontier((_point("full", 256, 30), _point("cluster", 13, 20)), reference="full")
    assert describe(failure_signs({"cluster": _summary(20)}, frontier, 256, {})) == "Failure signs: none of those that are looked for."
