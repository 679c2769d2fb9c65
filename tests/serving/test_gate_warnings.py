"""Tests of the warnings about budgets that the promotion gates did not accept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from parcelray.config.reducer import SaliencyConfig, ToMeConfig
from parcelray.config.serve import ServeJob
from parcelray.errors import UserError
from parcelray.evaluation.predict import PYFUNC_FILE
from parcelray.models.checkpoint import ModelPin, ResolvedCheckpoint
from parcelray.models.manifest import write_manifest
from parcelray.serving.plan import gate_warnings
from parcelray.tracking.mlflow_tracker import end_run, start_run
from parcelray.tracking.model_versions import GateRecord, find_version, record_reducer, record_verdict
from parcelray.tracking.registry import register_model

from ..stores import new_store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with two versions of `m`: the gates accepted 64 and 256 visual tokens of the first only."""
    root = tmp_path_factory.mktemp("store")
    uri = new_store(root)
    run_id = start_run(uri, "gates", "train-a-00000000", params={})
    end_run(uri, run_id, "FINISHED")
    for version in (1, 2):
        folder = root / str(version)
        folder.mkdir()
        save_file({"weight": torch.full((4,), float(version))}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        write_manifest(folder, config={}, git_commit=None, data={}, seed=0)
        register_model(uri, folder, "m", run_id, pyfunc_file=PYFUNC_FILE)
    record_verdict(uri, "m", 1, GateRecord("passed", "promote-m-00000000", run_id, "ann", (64, 256), ()))
    return uri


def warnings_of(uri: str, version: int, policy: dict[str, Any]) -> tuple[str, ...]:
    budgets = {"offered": [16, 64, 256], "policy": policy}
    job = ServeJob.model_validate({"kind": "serve", "name": "m", "budgets": budgets, "tracking": {"uri": uri}})
    return gate_warnings(
        job,
        ResolvedCheckpoint(
            Path("nowhere"), "models:/m@champion", ModelPin(reference=f"models:/m/{version}", digest="sha256:1")
        ),
    )


def test_a_floor_that_the_gates_did_not_accept_is_refused(uri: str) -> None:
    for policy in ({"type": "load", "floor": 16}, {"type": "load"}):
        with pytest.raises(
            UserError,
            match=(
                r"may choose 16 visual tokens, which the promotion gates of models:/m/1 did not accept \(accepted"
                r" budgets: 64, 256\); set .*\(64, 256\)"
            ),
        ):
            warnings_of(uri, 1, policy)
    assert warnings_of(uri, 1, {"type": "load", "floor": 64}) == ()


def test_a_version_without_gate_results_is_served_with_a_warning(uri: str) -> None:
    (warning,) = warnings_of(uri, 2, {"type": "load", "floor": 16})
    assert "models:/m/2 has no promotion gate results" in warning
    assert "16, 64, 256 visual tokens" in warning
    assert "--set candidate=2" in warning


def test_a_budget_that_was_not_accepted_gives_a_warning(uri: str) -> None:
    assert warnings_of(uri, 1, {"type": "request"}) == ()
    assert "may get 16 visual tokens" in warnings_of(uri, 1, {"type": "request", "auto": 16})[0]
    assert "may get 16 visual tokens" in warnings_of(uri, 1, {"type": "fixed", "visual_tokens": 16})[0]


def test_gate_results_hold_only_for_the_reducer_of_the_gates(uri: str) -> None:
    job = ServeJob.model_validate({"kind": "serve", "name": "m", "tracking": {"uri": uri}})
    pin = ModelPin(reference="models:/m/1", digest="sha256:1")
    (warning,) = gate_warnings(job, ResolvedCheckpoint(Path("nowhere"), "models:/m/1", pin), ToMeConfig())
    assert "models:/m/1 has no promotion gate results with the reducer tome" in warning


def test_a_version_keeps_the_reducer_that_it_was_promoted_with(uri: str) -> None:
    record_reducer(uri, "m", 2, SaliencyConfig(definition="norm", positions="image"))
    version = find_version(uri, "m", "2")
    assert version.reducer == SaliencyConfig(definition="norm", positions="image")
    assert version.gate_reducer is None
    record_reducer(uri, "m", 2, None)
    assert find_version(uri, "m", "2").reducer is None


def test_a_model_outside_the_registry_gives_no_warning(uri: str) -> None:
    job = ServeJob.model_validate({"kind": "serve", "name": "m", "tracking": {"uri": None}})
    assert (
        gate_warnings(
            job, ResolvedCheckpoint(Path("nowhere"), "mini_base", ModelPin(reference="mini_base", digest="sha256:1"))
        )
        == ()
    )
