"""Promotion of two tiny checkpoints: a passing version becomes the champion, a failed check is named and recorded."""

import getpass
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.promote import PromoteJob
from parcelray.config.reducer import AveragePoolingConfig, SpatialSamplingConfig
from parcelray.config.serve import ServeJob
from parcelray.errors import UserError
from parcelray.evaluation.plan import as_promoted
from parcelray.evaluation.run import run_evaluation
from parcelray.files import open_storage, upload_files
from parcelray.models.manifest import write_manifest
from parcelray.promotion import run as promotion
from parcelray.promotion.registered_models import list_models, roll_back, show_model
from parcelray.promotion.run import GateRefusal, Verdict, promotion_plan, run_promotion
from parcelray.serving.plan import pin
from parcelray.tracking import registry
from parcelray.tracking.mlflow_tracker import end_run, start_run
from parcelray.tracking.model_versions import find_version, record_reducer
from parcelray.tracking.registry import resolve_registry

from ..stores import new_store
from ..tiny import own_benchmark, tiny_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning"),
    pytest.mark.usefixtures("without_pictures"),
]
ROWS = 12


class Registry:
    """A store with two checkpoints, and a benchmark on which the first one answers every question correctly."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = new_store(root)
        self.first, self.second = (tiny_checkpoint(root / str(seed), seed) for seed in (1, 2))
        unscored = self.job(
            benchmarks=[{"name": "own", "data": str(own_benchmark(root / "blank", [["nothing"]] * ROWS))}],
            catalog=[str(root / "blank")],
        )
        answers = (
            run_evaluation(unscored.evaluation("before", str(self.first)), _console(), tables=False)
            .summary.splits[0]
            .answers
        )
        # The first checkpoint's answers at both budgets are the legal answers.
        self.data = own_benchmark(
            root / "data", [[few.text, many.text] for few, many in zip(answers[16], answers[64], strict=True)]
        )

    def job(self, **changes: Any) -> PromoteJob:
        data = {
            "kind": "promote",
            "name": "gate",
            "model": "tiny",
            "benchmarks": [{"name": "own", "data": str(self.root / "data")}],
            "catalog": [str(self.root / "data" / "own.yaml")],
            "budgets": [16, 64],
            "gates": {},
            "compute": {"actors": 0},
            "tracking": {"uri": self.uri},
            "storage": str(self.root),
        }
        return PromoteJob.model_validate(data | changes)

    def promote(self, *, force: bool = False, **changes: Any) -> Verdict:
        return run_promotion(self.job(**changes), _console(), force=force)

    def aliases(self) -> dict[str, int]:
        return {
            alias: int(version)
            for alias, version in MlflowClient(self.uri).get_registered_model("tiny").aliases.items()
        }


def _console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def made(without_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


def test_a_passing_version_is_promoted_and_a_worse_one_is_refused_then_forced_then_rolled_back(made: Registry) -> None:
    gates = {
        "retention": {"overall": {"16": 90}, "families": {"general": {"16": 90}}},
        "regression": {"margin": 1.0},
        "golden": [{"benchmark": "own", "sample": "row 3", "budgets": [16, 64]}],
        "latency": {"at_most_ms": {"16": 600_000}, "questions": 5},
    }
    verdict = made.promote(gates=gates, candidate=str(made.first))
    assert (verdict.version, verdict.champion, verdict.word) == (1, None, "passed")
    assert {check.gate for check in verdict.checks} == {"artifacts", "retention", "regression", "golden", "latency"}
    assert made.aliases() == {"challenger": 1, "champion": 1}
    assert verdict.budgets == find_version(made.uri, "tiny", "1").gate_budgets == (16, 64)

    with pytest.raises(GateRefusal) as refusal:
        made.promote(gates=gates, candidate=str(made.second))
    text = str(refusal.value)
    assert text.startswith("models:/tiny/2 is not promoted: ")
    assert "the score on all splits at 16 visual tokens against the champion's is -100.00 points" in text
    assert "the answer to row 3 at 64 visual tokens is" in text
    assert made.aliases() == {"challenger": 2, "champion": 1}
    failed = find_version(made.uri, "tiny", "2")
    assert (failed.verdict, failed.gate_budgets) == ("failed", ())
    assert any("-100.00 points" in sentence for sentence in json.loads(failed.tags["parcel.gate_failed"]))
    run = MlflowClient(made.uri).get_run(failed.tags["parcel.gate_run"])
    assert run.info.status == "FINISHED", "a failed gate is a result of the run, not a failure of it"
    assert run.data.tags["parcel.gate"] == "failed"

    # The same files stay the same version, also in another promotion job.
    with pytest.raises(GateRefusal, match="models:/tiny/2 is not promoted"):
        made.promote(
            name="again", gates={"latency": {"at_most_ms": {"16": 0.001}, "questions": 5}}, candidate=str(made.second)
        )
    forced = made.promote(gates=gates, candidate="challenger", force=True)
    assert (forced.version, forced.word) == (2, "forced")
    assert made.aliases() == {"challenger": 2, "champion": 2, "previous": 1}
    champion = find_version(made.uri, "tiny", "champion")
    assert champion.verdict == "forced"
    assert json.loads(champion.tags["parcel.gate_failed"])
    assert champion.tags["parcel.gate_user"] == getpass.getuser()
    assert MlflowClient(made.uri).get_run(champion.tags["parcel.gate_run"]).data.tags["parcel.gate_force"] == "True"

    back = roll_back("tiny", made.uri)
    assert [(each.version, "champion" in each.aliases) for each in back.versions] == [(2, False), (1, True)]
    assert made.aliases() == {"challenger": 2, "champion": 1, "previous": 2}
    listed = list_models(made.uri)
    assert listed.to_dict()["models"] == [
        {"name": "tiny", "versions": 2, "aliases": {"champion": 1, "challenger": 2, "previous": 2}}
    ]
    assert {version.version: version.verdict for version in show_model("tiny", None, made.uri).versions} == {
        1: "passed",
        2: "forced",
    }


@pytest.mark.nightly
def test_a_candidate_at_a_uri_is_promoted_with_its_results_on_object_storage(made: Registry, s3: str) -> None:
    filesystem, path = open_storage(s3)
    upload_files(made.first, filesystem, f"{path}/model")
    changes: dict[str, Any] = {"name": "stored", "model": "stored", "storage": s3}
    changes |= {"gates": {"retention": {"overall": {"16": 0}}}}
    verdict = made.promote(**changes, candidate=f"{s3}/model")
    assert (verdict.version, verdict.word) == (1, "passed")
    # The same content in a folder is the same version, and its predictions are reused.
    assert made.promote(**changes, candidate=str(made.first)).version == 1
    files = [name.removeprefix(f"{path}/") for name in filesystem.find(path)]
    assert f"promote/stored/{verdict.mlflow_run_id}/verdict-v1-1.json" in files
    assert "evaluate/gate-stored-v1/result.json" in files
    assert any(name.startswith("predictions/own/") for name in files)


@pytest.mark.nightly
def test_a_version_is_promoted_and_served_with_its_reducer(made: Registry, tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        tmp_path,
        1,
        connector={"type": "identity"},
        budget={"type": "uniform", "budgets": [256]},
        validation={"budgets": [256]},
    )
    changes: dict[str, Any] = {"name": "reduced", "model": "reduced", "candidate": str(folder)}
    job = ServeJob.model_validate(
        {
            "kind": "serve",
            "name": "reduced",
            "model": {"reference": "models:/reduced@champion"},
            "budgets": {"offered": [16, 64], "policy": {"type": "load"}},
            "tracking": {"uri": made.uri},
        }
    )
    gates = {"latency": {"at_most_ms": {"16": 600_000}, "questions": 5}, "retention": {"overall": {"16": 0, "64": 0}}}
    first = {"type": "spatial_sampling", "positions": "image"}
    verdict = made.promote(**changes, gates=gates, reducer=first)
    assert (verdict.word, verdict.budgets, verdict.to_dict()["reducer"]) == ("passed", (16, 64), first)
    assert (
        find_version(made.uri, "reduced", "1").tags["parcel.reducer"]
        == SpatialSamplingConfig(positions="image").to_json()
    )
    pinned = pin(job)
    assert (pinned.reducer, pinned.warnings) == (SpatialSamplingConfig(positions="image"), ())
    # The same files with another reducer that fails its gate are still served with the one that passed.
    with pytest.raises(GateRefusal, match=r"retention .* at 16 visual tokens"):
        made.promote(**changes, gates={"retention": {"overall": {"16": 1000}}}, reducer={"type": "average_pooling"})
    assert find_version(made.uri, "reduced", "1").gate_reducer == AveragePoolingConfig()
    pinned = pin(job)
    assert pinned.reducer == SpatialSamplingConfig(positions="image")
    assert "has no promotion gate results with the reducer spatial_sampling" in pinned.warnings[0]
    # The champion of the regression gate is the version with the reducer that it is served with.
    regression = {"regression": {"margin": 100.0}}
    again = made.promote(**changes, gates=regression, reducer={"type": "average_pooling"})
    assert {check.what for check in again.checks if check.gate == "regression"} == {
        f"the score on all splits at {budget} visual tokens against the champion's" for budget in (16, 64)
    }
    assert pin(job).reducer == AveragePoolingConfig()


def test_an_evaluation_of_a_version_applies_the_reducer_that_it_was_promoted_with(made: Registry) -> None:
    reducer = SpatialSamplingConfig(positions="image")
    made.promote(name="plain", model="plain", candidate=str(made.first))
    record_reducer(made.uri, "plain", 1, reducer)
    data = {
        "kind": "evaluate",
        "name": "reduced",
        "benchmarks": ["mini"],
        "tracking": {"uri": made.uri},
        "model": {"reference": "models:/plain@champion"},
    }
    job, note = as_promoted(EvaluateJob.model_validate(data))
    assert (job.model.reference, job.reducer) == ("models:/plain/1", reducer)
    assert note is not None
    assert "models:/plain/1 is evaluated with the reducer spatial_sampling, which it was promoted with" in note
    for own in ({"type": "average_pooling"}, None):
        stated = EvaluateJob.model_validate(data | {"reducer": own})
        assert as_promoted(stated) == (stated, None)
    record_reducer(made.uri, "plain", 1, None)
    plain = EvaluateJob.model_validate(data)
    assert as_promoted(plain) == (plain, None)


def test_a_new_version_belongs_to_the_run_that_trained_it(made: Registry, tmp_path: Path) -> None:
    trained = start_run(made.uri, "parcelray", "train-third-00000000", params={})
    end_run(made.uri, trained, "FINISHED")
    folder = tiny_checkpoint(tmp_path, 3)
    write_manifest(folder, config={}, git_commit=None, data=None, seed=3, extra={"identity": "train-third-00000000"})
    verdict = made.promote(name="third", model="other", candidate=str(folder))
    assert (verdict.version, verdict.word) == (1, "passed")
    assert find_version(made.uri, "other", "champion").run_id == trained


def test_a_failed_latency_gate_names_the_measured_time(made: Registry) -> None:
    with pytest.raises(
        GateRefusal, match=r"p95 of one question at 64 visual tokens is .* ms, but the gate requires at most 0.001 ms"
    ):
        made.promote(name="slow", gates={"latency": {"at_most_ms": {"64": 0.001}, "questions": 5}}, candidate=1)


def test_changed_files_are_not_promoted_even_by_force(made: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = resolve_registry("models:/tiny/2", made.uri)
    kept = made.root / "kept.safetensors"
    shutil.copy(folder / "model.safetensors", kept)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    try:
        for force in (False, True):
            with pytest.raises(
                GateRefusal,
                match=(
                    r"signature, manifest and files is model\.safetensors in .* has SHA-256.*Register the checkpoint"
                    r" again"
                ),
            ):
                made.promote(name="changed", candidate=2, force=force)
        assert made.aliases()["champion"] == 1
    finally:
        shutil.copy(kept, folder / "model.safetensors")


def test_a_champion_that_changed_during_the_evaluation_is_not_replaced(
    made: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*arguments: Any) -> list[str]:
        MlflowClient(made.uri).delete_registered_model_alias("tiny", "champion")
        return []

    assert made.aliases()["champion"] == 1
    monkeypatch.setattr(promotion, "artifact_problems", meanwhile)
    try:
        with pytest.raises(
            UserError, match=r"champion of model 'tiny' pointed to version 1 when .* and points to no version now"
        ):
            made.promote(name="race", candidate=2)
        assert "champion" not in made.aliases()
    finally:
        registry.promote(made.uri, "tiny", 1)


def test_every_verdict_is_written_to_a_new_file(made: Registry) -> None:
    for _ in range(2):
        verdict = made.promote(name="files", candidate=1)
    folder = made.root / "promote" / "files" / verdict.mlflow_run_id
    assert sorted(path.name for path in folder.iterdir()) == ["verdict-v1-1.json", "verdict-v1-2.json"]
    assert json.loads((folder / "verdict-v1-2.json").read_text())["user"] == getpass.getuser()


def test_a_version_with_another_signature_is_refused(made: Registry) -> None:
    folder, _ = resolve_registry("models:/tiny/2", made.uri)
    description = folder.parent.parent / "MLmodel"
    text = description.read_text()
    description.write_text(text.replace("num_visual_tokens", "tokens"))
    try:
        with pytest.raises(GateRefusal, match="its signature is"):
            made.promote(name="signature", candidate=2)
    finally:
        description.write_text(text)


def test_a_plan_counts_questions_and_registers_nothing(made: Registry) -> None:
    plan = promotion_plan(made.job(candidate=str(made.second)))
    assert (plan.questions, plan.answers) == (ROWS, 2 * ROWS)
    assert promotion_plan(made.job(candidate="2")).model == "models:/tiny/2"
    assert [version.version for version in show_model("tiny", None, made.uri).versions] == [2, 1]


def test_candidates_that_do_not_exist_are_refused(made: Registry) -> None:
    with pytest.raises(UserError, match="Model 'tiny' has no version 9; its versions are: 1, 2"):
        made.promote(candidate=9)
    with pytest.raises(UserError, match="has no version or alias 'nobody'; its aliases are: challenger, champion"):
        made.promote(candidate="nobody")
    with pytest.raises(UserError, match="There is no registered model 'nobody'"):
        made.promote(model="nobody", candidate="challenger")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"gates": {"retention": {"overall": {"32": 50}}}},
            r"gates use the budgets \[32\], which are not in budgets",
        ),
        (
            {"gates": {"golden": [{"benchmark": "mini", "sample": "x", "budgets": [16]}]}},
            r"golden answers use the benchmarks \['mini'\]",
        ),
        ({"tracking": {"uri": None}}, "the model registry is in the tracking store"),
        ({"gates": {"latency": {"at_most_ms": {}}}}, "at least 1 item"),
    ],
)
def test_gates_that_cannot_be_checked_are_refused(made: Registry, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made.job(**changes)
