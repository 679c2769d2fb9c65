"""Failure signs are found where they are, and only there."""

from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.studies.reduction.breaks import FinePoint
from parcelray.studies.reduction.comparisons import Against
from parcelray.studies.reduction.signs import describe, failure_signs


def _interval(value: float) -> Interval:
    return Interval(value, value, value, 100)


def _point(method: str, tokens: int, text: float, general: float) -> FrontierPoint:
    return FrontierPoint(
        method, tokens, _interval(text), None, {"textvqa_val": _interval(text), "general": _interval(general)}, 0
    )


def _fine(method: str, kept: float, tokens: int = 13) -> FinePoint:
    return FinePoint(method, "text", tokens, _interval(kept))


def _against(method: str, gap: float, p_value: float) -> Against:
    return Against(method, 13, _interval(gap), p_value, p_value, None)


def test_each_sign_is_a_sentence() -> None:
    frontier = Frontier((_point("blind", 0, 2, 35), _point("full", 256, 30, 40)), reference="full")
    fine = [_fine("cluster", 70), _fine("VisionZip", 12), _fine("VisionZip", 12, tokens=28)]
    against = [
        _against("VisionZip", -3, 0.001),
        _against("PruMerge", -1, 0.3),
        _against("cluster", -4, 0.001),
        _against("VisionZip", 3, 0.001),
    ]
    signs = failure_signs(
        frontier, fine, against, ["VisionZip", "PruMerge"], {("random", 13): 3.5, ("random", 28): 0.4}
    )
    assert len(signs) == 4
    assert signs[0].startswith(
        "general measures language more than vision: without any image the model scores 35.0, with all tokens 40.0"
    )
    assert signs[1] == "At 5% of the tokens text falls below half of its full score under 1 of 2 methods: VisionZip."
    assert signs[2].startswith("VisionZip loses to spatial sampling at 13 tokens by 3.0 points")
    assert signs[3].startswith("random at 13 tokens varies by 3.5 points")
    assert describe(signs).count("\n- ") == 4


def test_no_sign_is_said_so() -> None:
    frontier = Frontier((_point("full", 256, 30, 40), _point("cluster", 13, 20, 30)), reference="full")
    assert (
        describe(failure_signs(frontier, [_fine("cluster", 80)], [], [], {}))
        == "Failure signs: none of those that are looked for."
    )
