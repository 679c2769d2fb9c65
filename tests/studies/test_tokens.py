"""The studies of spectra and tokens, from checkpoints to tables, pictures and MLflow, in this process."""

import json
from io import StringIO
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from parcelray.config.train import TrackingConfig
from parcelray.errors import UserError
from parcelray.studies.tokens import study_spectra, study_tokens

from ..stores import new_store
from ..tiny import tiny_checkpoint


@pytest.mark.nightly
def test_spectra_and_tokens_are_studied_and_recorded(checkpoint: Path, tmp_path: Path) -> None:
    parcel = str(tiny_checkpoint(tmp_path / "parcel", seed=0))
    models = [parcel, str(checkpoint)]
    tracking = TrackingConfig(uri=new_store(tmp_path))
    output = StringIO()
    console = Console(file=output, width=200)
    spectral = study_spectra(models, console, count=8, folder=tmp_path / "spectral", tracking=tracking)
    tokens = study_tokens(
        models, console, count=8, budgets=[100, 256], folder=tmp_path / "tokens", tracking=TrackingConfig(uri=None)
    )
    # The LLaVA has no compression: no pooled grid at 64 tokens, and no budget of 100.
    assert [(each.grid.model, each.grid.part, len(each.power)) for each in spectral.pooled] == [(parcel, "anchors", 4)]
    assert {(each.grid.model, each.grid.part) for each in spectral.spectra} == {
        *((parcel, part) for part in ("anchors", "queries", "maps", "patches")),
        *((str(checkpoint), part) for part in ("anchors", "patches")),
    }
    assert {(name, each.part, each.num_visual_tokens) for name, parts in tokens.items() for each in parts} == {
        *((parcel, part, budget) for part in ("anchors", "queries", "all") for budget in (100, 256)),
        (str(checkpoint), "anchors", 256),
    }
    assert "does not support 100 visual tokens; they are left out" in output.getvalue()
    written = {name: json.loads((tmp_path / name / f"{name}.json").read_text()) for name in ("spectral", "tokens")}
    assert written["spectral"] == spectral.to_dict()
    assert written["tokens"] == {name: [each.to_dict() for each in parts] for name, parts in tokens.items()}
    for name in written:
        with Image.open(tmp_path / name / f"{name}.png") as image:
            assert image.width > 300
    client = MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    recorded = {run.info.run_name: run.data.metrics for run in client.search_runs([experiment.experiment_id])}
    assert recorded["analyze-spectral-spectral"]["model/queries_256/centroid"] > 0


def test_budgets_that_a_model_lacks_are_refused_with_the_legal_ones(checkpoint: Path, tmp_path: Path) -> None:
    console, tracking = Console(quiet=True), TrackingConfig(uri=None)
    with pytest.raises(
        UserError, match=r"supports none of the budgets 5, 7 \(visual tokens per image\); choose from 256"
    ):
        study_tokens([str(checkpoint)], console, budgets=[5, 7], folder=tmp_path, tracking=tracking)
    with pytest.raises(UserError, match="supports none of the budgets 64, 100"):
        study_spectra([str(checkpoint)], console, budget=100, folder=tmp_path, tracking=tracking)
