"""Training and report on NLVR, with the same loop and files as on the mini suite."""

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from parcelray.datasets.nlvr.questions import TASKS
from parcelray.errors import UserError
from parcelray.training.run import run_training

from .conftest import tiny_job


@pytest.mark.parametrize("view", ["boxes", pytest.param("picture", marks=pytest.mark.nightly)])
def test_nlvr_report_has_all_tasks_and_the_baselines_majority_and_blind(
    view: str, nlvr_dir: Path, tmp_path: Path
) -> None:
    job = tiny_job(
        tmp_path,
        data={"type": "nlvr", "path": str(nlvr_dir), "view": view},
        training={"steps": 2, "images_per_step": 12, "log_every_steps": 1},
        validation={"samples": 2, "budgets": [16]},
        report={"samples": 12, "budgets": [16, 64]},
    )
    output = StringIO()
    run = run_training(job, Console(file=output, width=200))
    frontier = json.loads((run.model_folder.parent / "frontier.json").read_text(encoding="utf-8"))
    assert [(point["method"], point["num_visual_tokens"]) for point in frontier["points"]] == [
        ("majority", 0),
        ("blind", 0),
        ("parcel", 16),
        ("parcel", 64),
    ]
    for point in frontier["points"]:
        assert set(point["families"]) == set(TASKS)
        # Sentences are taken whole until the limit is reached; each has 6 to 24 pictures.
        assert 12 <= point["families"]["statement"]["n"] < 12 + 24
    assert {f"test/consistency@{budget}" for budget in (0, 16, 64)} <= set(run.metrics)
    assert re.search(r"Consistency, 16 visual tokens: .* of [1-9] sentences", output.getvalue())


def test_a_missing_corpus_is_refused_with_the_setting_to_change(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, data={"type": "nlvr", "path": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"contains no NLVR corpus .*--set data\.path=FOLDER"):
        run_training(job, Console(file=StringIO()))
