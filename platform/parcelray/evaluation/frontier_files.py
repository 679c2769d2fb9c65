"""The frontier as files: numbers for programs, a picture for people."""

import json
from pathlib import Path

from parcelray.evaluation.frontier_plot import plot_frontier
from parcelray.evaluation.scoring.aggregate import Frontier


def write_frontier(frontier: Frontier, folder: Path, title: str) -> tuple[Path, Path]:
    """Writes frontier.json and frontier.png into a folder; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / "frontier.json", folder / "frontier.png"
    numbers.write_text(json.dumps(frontier.to_dict(), indent=2) + "\n", encoding="utf-8")
    plot_frontier(frontier, picture, title=title)
    return numbers, picture
