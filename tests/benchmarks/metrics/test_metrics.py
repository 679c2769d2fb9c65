"""The per-sample metrics, on cases computed by hand."""

import math

import pytest

from parcelray.benchmarks.metrics import METRICS
from parcelray.benchmarks.metrics.box_iou import Box, format_locations, iou, parse_locations
from parcelray.benchmarks.metrics.consistency import consistency
from parcelray.data.sample import Sample


def _sample(*answers: str, metric: str = "exact_match") -> Sample:
    return Sample(id="1", benchmark="b", family="f", task="t", images=(), prompt="?", answers=answers, metric=metric)


@pytest.mark.parametrize(
    ("prediction", "answers", "value"),
    [("Red", ("red",), 1), (" red. ", ("red",), 1), ("six", ("6", "six"), 1), ("dark  red", ("dark red",), 1), ("blue", ("red",), 0), ("", ("red",), 0)],
)
def test_exact_match(prediction: str, answers: tuple[str, ...], value: float) -> None:
    assert METRICS["exact_match"](prediction, _sample(*answers)) == value


def test_an_answer_that_is_not_there_cannot_be_scored() -> None:
    assert math.isnan(METRICS["exact_match"]("red", _sample()))
    assert math.isnan(METRICS["box_iou"]("<loc0000><loc0000><loc0512><loc0512>", _sample("no box", metric="box_iou")))


def test_intersection_over_union() -> None:
    # Unit square against its right half and as much beside it: 0.5 / 1.5.
    assert iou(Box(0, 0, 1, 1), Box(0, 0.5, 1, 1.5)) == pytest.approx(1 / 3)
    assert iou(Box(0, 0, 1, 1), Box(0, 0, 1, 1)) == 1
    assert iou(Box(0, 0, 0.2, 0.2), Box(0.5, 0.5, 1, 1)) == 0
    assert iou(Box(0.5, 0.5, 0.1, 0.1), Box(0, 0, 1, 1)) == 0


def test_locations_are_written_as_paligemma_does() -> None:
    text = format_locations(Box(0.0, 0.25, 0.5, 1.0))
    assert text == "<loc0000><loc0256><loc0512><loc1023>"
    box = parse_locations(f"{text} red circle")
    assert box is not None
    assert box == pytest.approx((0.0, 0.25, 0.5, 1.0), abs=1e-3)
    assert parse_locations("<loc0000><loc0256>") is None


def test_a_box_counts_from_half_overlap_on() -> None:
    target = format_locations(Box(0, 0, 0.5, 0.5))
    sample = _sample(f"{target} cat", metric="box_iou")
    assert METRICS["box_iou"](target, sample) == 1
    assert METRICS["box_iou"](format_locations(Box(0, 0, 0.5, 0.3)), sample) == 1
    assert METRICS["box_iou"](format_locations(Box(0, 0, 0.5, 0.2)), sample) == 0
    assert METRICS["box_iou"]("nothing", sample) == 0


def test_a_sentence_is_consistent_only_if_all_its_pictures_are_right() -> None:
    assert consistency([("a", 1.0), ("b", 1.0), ("a", 1.0), ("b", 0.0), ("c", 1.0)]) == pytest.approx(2 / 3)
    assert consistency([("a", 1.0), ("a", math.nan), ("a", 1.0)]) == 0
    assert math.isnan(consistency([]))
