"""The frontier as a table and as a plot."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from parcelray.datasets.sample import Sample
from parcelray.evaluation.frontier import frontier_markdown, frontier_table, write_frontier
from parcelray.evaluation.scoring.aggregate import Frontier, frontier_point
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, SplitScores, score_splits


@pytest.fixture
def frontier() -> Frontier:
    def scores(right: int, budget: int) -> list[SplitScores]:
        rows = [(family, index) for family in ("general", "video") for index in range(10)]
        samples = [
            Sample(f"{family}-{index}", "mini", family, "t", (), "?", ("x",), scene=f"{index}")
            for family, index in rows
        ]
        answers = [GivenAnswer("x" if index < right else "y") for _ in range(2) for index in range(10)]
        return score_splits(samples, {budget: answers}, ScoringRules(split_of=lambda sample: f"mini/{sample.family}"))

    reference = (scores(8, 256), 256)
    points = [
        frontier_point("majority", 0, scores(2, 0), None),
        frontier_point("vanilla", 256, reference[0], reference),
    ]
    points += [
        frontier_point("parcel", budget, scores(right, budget), reference)
        for budget, right in ((16, 4), (64, 6), (256, 8))
    ]
    return Frontier(tuple(points), reference="vanilla")


def test_the_table_has_a_row_per_method_and_budget(frontier: Frontier) -> None:
    output = io.StringIO()
    Console(file=output, width=160).print(frontier_table(frontier))
    assert "60.0 [" in output.getvalue()
    assert "75.0 [" in output.getvalue()
    rows = frontier_markdown(frontier).splitlines()
    assert len(rows) == 2 + len(frontier.points)
    assert rows[2].startswith("| majority | - | 20.0 [")


def test_the_plot_is_a_readable_png(frontier: Frontier, tmp_path: Path) -> None:
    numbers, picture = write_frontier(frontier, tmp_path, "a title")
    assert json.loads(numbers.read_text()) == json.loads(json.dumps(frontier.to_dict()))
    with Image.open(picture) as image:
        assert image.width >= 1200
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50
