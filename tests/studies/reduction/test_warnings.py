"""Each warning is given in its case, and only there."""

from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.studies.reduction.breakpoints import FinePoint
from parcelray.studies.reduction.comparisons import PairwiseResult
from parcelray.studies.reduction.warnings import describe, warnings_of


def _interval(value: float) -> Interval:
    return Interval(value, value, value, 100)


def _point(method: str, tokens: int, text: float, general: float) -> FrontierPoint:
    return FrontierPoint(
        method, tokens, _interval(text), None, {"textvqa_val": _interval(text), "general": _interval(general)}, 0
    )


def _fine(method: str, kept: float, tokens: int = 13) -> FinePoint:
    return FinePoint(method, "text", tokens, _interval(kept))


def _against(method: str, gap: float, p_value: float) -> PairwiseResult:
    return PairwiseResult(method, 13, _interval(gap), p_value, p_value, None)


def test_each_warning_is_a_sentence() -> None:
    frontier = Frontier((_point("blind", 0, 2, 35), _point("full", 256, 30, 40)), reference="full")
    fine = [_fine("cluster", 70), _fine("VisionZip", 12), _fine("VisionZip", 12, tokens=28)]
    against = [
        _against("VisionZip", -3, 0.001),
        _against("PruMerge", -1, 0.3),
        _against("cluster", -4, 0.001),
        _against("VisionZip", 3, 0.001),
    ]
    warnings = warnings_of(
        frontier, fine, against, ["VisionZip", "PruMerge"], {("random", 13): 3.5, ("random", 28): 0.4}
    )
    assert len(warnings) == 4
    assert warnings[0].startswith(
        "general measures language more than vision: without any image the model scores 35.0, with all tokens 40.0"
    )
    assert warnings[1] == "At 5% of the tokens text falls below half of its full score under 1 of 2 methods: VisionZip."
    assert warnings[2].startswith("VisionZip is worse than spatial sampling at 13 tokens by 3.0 points")
    assert warnings[3].startswith("random at 13 tokens varies by 3.5 points")
    assert describe(warnings).count("\n- ") == 4


def test_a_study_without_warnings_states_it() -> None:
    frontier = Frontier((_point("full", 256, 30, 40), _point("cluster", 13, 20, 30)), reference="full")
    assert describe(warnings_of(frontier, [_fine("cluster", 80)], [], [], {})) == "Warnings: none; all checks passed."
