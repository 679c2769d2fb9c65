"""The walk through a training on one's own conversations in docs/training.md works as printed, on a tiny model."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.train import TrainJob
from parcelray.evaluation.run import run_evaluation
from parcelray.training.run import run_training
from tests.datasets.conversation_data import picture

SECTION = "### Your own conversations"


@pytest.mark.nightly
@pytest.mark.usefixtures("without_pictures")
def test_the_walk_through_trains_and_evaluates(
    tmp_path: Path, tiny_start: dict[str, Any], repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (repo_root / "docs" / "training.md").read_text(encoding="utf-8").partition(SECTION)[2]
    (printed,) = re.findall(r"^```json\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    train, evaluate = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    rows = []
    for copy in range(8):
        # Each copy has images of its own, so that there are enough for the held-out splits.
        rows += json.loads(re.sub(r"\b([abc])\.png", rf"\g<1>{copy}.png", printed))
        for number, letter in enumerate("abc"):
            (tmp_path / "pictures" / f"{letter}{copy}.png").write_bytes(picture(3 * copy + number))
    (tmp_path / "my_data.json").write_text(json.dumps(rows))
    tiny = {
        "model": tiny_start,
        "connector": {"type": "parcel", "num_heads": 2},
        "training": {"steps": 4, "images_per_step": 4},
        "tracking": {"uri": None},
    }
    console = Console(file=io.StringIO(), record=True, width=160)
    metrics = run_training(TrainJob.model_validate(yaml.safe_load(train) | tiny), console).metrics
    assert {"test/score@16", "test/score@64", "test/score@256"} <= metrics.keys()
    job = EvaluateJob.model_validate(yaml.safe_load(evaluate) | {"tracking": {"uri": None}})
    (split,) = run_evaluation(job, console).summary.splits
    assert set(split.scores) == {0, 16, 64, 256}
    assert "chance" in console.export_text()
