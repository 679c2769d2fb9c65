"""The studies of attention and redundancy, from a checkpoint to tables, pictures and MLflow, in this process."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from parcelray.config.train import TrackingConfig
from parcelray.errors import UserError
from parcelray.studies.attention import study_redundancy, study_saliency, study_validity

from ..stores import new_store

pytestmark = pytest.mark.usefixtures("without_pictures")


def test_attention_and_redundancy_are_studied_and_recorded(checkpoint: Path, tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=new_store(tmp_path))
    output = StringIO()
    console = Console(file=output, width=200)
    saliency = study_saliency(str(checkpoint), console, count=2, folder=tmp_path / "saliency", tracking=tracking)
    validity = study_validity(
        str(checkpoint), console, count=2, permutations=100, folder=tmp_path / "validity", tracking=tracking
    )
    redundancy = study_redundancy(
        [str(checkpoint)], console, count=2, folder=tmp_path / "redundancy", tracking=tracking
    )
    for name in (
        "saliency/agreement.png",
        "saliency/heat_maps_1.png",
        "validity/validity.png",
        "redundancy/redundancy.png",
    ):
        with Image.open(tmp_path / name) as image:
            assert image.width > 300
    written = {
        name: json.loads((tmp_path / name / f"{name}.json").read_text())
        for name in ("saliency", "validity", "redundancy")
    }
    assert written["saliency"]["last word"] == saliency["last word"].to_dict()
    assert written["validity"]["pairs"] == 2
    assert written["validity"]["measures"] == {name: each.to_dict() for name, each in validity.items()}
    assert {"random", "norm", "vision tower", "last word, layer 0"} <= validity.keys()
    assert written["redundancy"] == {str(checkpoint): redundancy[str(checkpoint)].to_dict()}
    assert "pairs of" in output.getvalue()
    client = MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    recorded = {run.info.run_name: run.data.metrics for run in client.search_runs([experiment.experiment_id])}
    assert recorded.keys() == {f"analyze-{name}-{name}" for name in written}
    assert recorded["analyze-validity-validity"]["norm/correlation"] == pytest.approx(
        validity["norm"].correlation.value
    )


def test_a_folder_of_images_needs_prompts_and_enough_images(checkpoint: Path, tmp_path: Path) -> None:
    for number in range(2):
        Image.fromarray(np.full((40, 50, 3), 100 * number, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    console, tracking = Console(quiet=True), TrackingConfig(uri=None)
    prompts = ["what is this", "how many"]
    with pytest.raises(UserError, match="0 prompts were given for the images of"):
        study_saliency(
            str(checkpoint), console, images=str(tmp_path), count=2, folder=tmp_path / "out", tracking=tracking
        )
    with pytest.raises(UserError, match="holds 2 images, but 9 are needed"):
        study_saliency(
            str(checkpoint),
            console,
            images=str(tmp_path),
            count=9,
            prompts=prompts,
            folder=tmp_path / "out",
            tracking=tracking,
        )
    report = study_saliency(
        str(checkpoint),
        console,
        images=str(tmp_path),
        count=2,
        prompts=prompts,
        folder=tmp_path / "out",
        tracking=tracking,
    )
    assert len(report["last word"].between_prompts) == 3
