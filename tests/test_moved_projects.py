"""A project or a run folder that was moved or copied is used from its new place: nothing points to the old one."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.serve import ServeJob
from parcelray.evaluation.compare import compare_evaluations
from parcelray.evaluation.predict import PYFUNC_FILE
from parcelray.evaluation.run import run_evaluation
from parcelray.evaluation.scoring.evaluation import load_evaluation
from parcelray.evaluation.scoring.summary import rescore
from parcelray.serving.plan import serving_plan
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, end_run, start_run
from parcelray.tracking.model_versions import artifact_problems
from parcelray.tracking.registry import promote, register_model, resolve_model
from parcelray.tracking.run_folder import stored_path
from parcelray.tracking.store import ensure_store
from parcelray.training.run import run_training

from .stores import new_store
from .tiny import own_benchmark, tiny_checkpoint
from .training.conftest import few_tokenizer_texts, tiny_job

pytestmark = [
    pytest.mark.usefixtures("without_pictures"),
    pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning"),
]


def _console() -> Console:
    return Console(file=io.StringIO(), width=200)


def _evaluation(project: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> EvaluateJob:
    """The job of an evaluation whose files are all in the project, with relative paths."""
    monkeypatch.chdir(project)
    return EvaluateJob.model_validate(
        {
            "kind": "evaluate",
            "name": "e",
            "model": {"reference": "start/model"},
            "reference": {"reference": "start/model"},
            "benchmarks": [{"name": "own", "data": "own", "max_new_tokens": 2}],
            "catalog": ["own/own.yaml"],
            "budgets": [16],
            "compute": {"actors": 0},
            "tracking": {"uri": None},
            "storage": "runs",
        }
        | changes
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a checkpoint, data, and an evaluation with a reference."""
    project = tmp_path_factory.mktemp("projects") / "project"
    project.mkdir()
    tiny_checkpoint(project / "start", seed=3)
    own_benchmark(project / "own", [["red"], ["blue"], ["red"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parcelray.evaluation.results.plot_evaluation", lambda summary, path: path.touch())
        run_evaluation(_evaluation(project, patch), _console(), tables=False)
    return project


def test_a_moved_project_is_scored_compared_and_resumed(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "moved"
    shutil.copytree(evaluated, project)
    # Without the copy, a use of the old place would not be noticed.
    monkeypatch.chdir(tmp_path)
    evaluated.rename(evaluated.with_name("gone"))
    try:
        folder = project / "runs" / "evaluate" / "e"
        assert rescore(folder, {}, 5.0).budgets == (16,)
        assert rescore(Path("moved/runs/evaluate/e"), {}, 5.0).budgets == (16,)
        assert compare_evaluations(f"{folder}@16", f"{folder}@16").pairs
        run = run_evaluation(_evaluation(project, monkeypatch), _console(), tables=False)
        assert (run.computed, run.present) == (0, 6)
    finally:
        evaluated.with_name("gone").rename(evaluated)


def test_a_copied_project_uses_its_own_files(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated, tmp_path / "copy")
    for folder in ("e", "e/reference"):
        evaluation = load_evaluation(tmp_path / "copy" / "runs" / "evaluate" / folder)
        assert evaluation.store == str(tmp_path / "copy" / "runs" / "predictions")


def test_a_run_folder_that_was_moved_alone_finds_its_predictions(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "runs" / "evaluate" / "e", tmp_path / "elsewhere")
    assert rescore(tmp_path / "elsewhere", {}, 5.0).budgets == (16,)


def test_no_file_of_an_evaluation_but_its_own_place_is_absolute(evaluated: Path) -> None:
    for file in (evaluated / "runs").rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        if file.name == "evaluation.json":
            own = json.loads(text)
            assert own.pop("folder") == str(file.parent)
            text = json.dumps(own)
        assert str(evaluated) not in text, file


def test_an_old_evaluation_with_absolute_paths_is_scored_where_it_is_now(tmp_path: Path) -> None:
    with tarfile.open(Path(__file__).parent / "fixtures" / "old_layout" / "artefacts.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "runs" / "evaluate" / "old"
    assert Path(json.loads((folder / "evaluation.json").read_text())["store"]).is_absolute()
    before = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert rescore(folder, {}, 5.0).budgets == tuple(before["budgets"])
    # With its old absolute path, which still exists, the folder may be anywhere.
    (tmp_path / "alone").mkdir()
    moved = shutil.move(folder, tmp_path / "alone" / "old")
    data = json.loads((Path(moved) / "evaluation.json").read_text())
    (Path(moved) / "evaluation.json").write_text(json.dumps(data | {"store": str(tmp_path / "runs" / "predictions")}))
    assert rescore(Path(moved), {}, 5.0).budgets == tuple(before["budgets"])


def test_a_moved_training_is_recognised_and_starts_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_tokenizer_texts(monkeypatch)
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    monkeypatch.chdir(old)
    short = {"steps": 1, "images_per_step": 4}
    first = run_training(tiny_job(Path("runs"), training=short, validation={"samples": 1}), _console())
    assert first.model_folder == old / "runs" / "train" / "tiny" / "model"
    monkeypatch.chdir(tmp_path)
    old.rename(new)
    monkeypatch.chdir(new)
    again = run_training(tiny_job(Path("runs"), training=short, validation={"samples": 1}), _console())
    assert again.was_done
    assert again.model_folder == new / "runs" / "train" / "tiny" / "model"
    assert again.model_folder.is_dir()
    # A warm start by the same relative path.
    start = {"type": "checkpoint", "reference": "runs/train/tiny/model"}
    warm = tiny_job(Path("runs"), name="warm", model=start, connector=None, training=short, validation={"samples": 1})
    assert run_training(warm, _console()).model_folder.is_dir()
    assert not old.exists(), "nothing is written to the old place"


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_the_registry_and_the_runs_of_a_moved_project_are_used(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    uri = ensure_store(new_store(old / "runs"))
    run_id = start_run(uri, "parcelray", "train-a-00000000", params={})
    version = register_model(
        uri, tiny_checkpoint(old / "start", seed=3), "m", run_id, pyfunc_file=PYFUNC_FILE, example_budget=16
    )
    promote(uri, "m", version)
    end_run(uri, run_id, "FINISHED")
    (old.rename if how == "moved" else lambda target: shutil.copytree(old, target))(new)
    monkeypatch.chdir(new)
    store = "sqlite:///runs/mlflow.db"
    resolved = resolve_model(CheckpointModelConfig(reference="models:/m@champion"), store)
    assert resolved.path.is_relative_to(new)
    assert artifact_problems(ensure_store(store), "m", version) == []
    job = ServeJob.model_validate(
        {
            "kind": "serve",
            "name": "s",
            "model": {"reference": "models:/m@champion"},
            "budgets": {"offered": [16]},
            "tracking": {"uri": store},
        }
    )
    assert serving_plan(job).model == f"models:/m/{version}"
    # New files of old runs go to the new place.
    (tmp_path / "note.txt").write_text("a note")
    logger = MlflowRunLogger(ensure_store(store), run_id)
    logger.log_artifact(tmp_path / "note.txt")
    logger.close()
    (note,) = (new / "runs").rglob("note.txt")
    client = MlflowClient(ensure_store(store))
    assert [file.path for file in client.list_artifacts(run_id)] == ["note.txt"]
    assert Path(note).read_text() == "a note"
    assert list(old.rglob("note.txt")) == []


def test_artifacts_at_a_place_of_their_own_stay_there(tmp_path: Path) -> None:
    uri = ensure_store(new_store(tmp_path / "runs"))
    client = MlflowClient(uri)
    own = (tmp_path / "shared" / "artifacts" / "parcelray").as_uri()
    client.create_experiment("parcelray", artifact_location=own)
    ensure_store(uri)
    experiment = client.get_experiment_by_name("parcelray")
    assert experiment is not None
    assert experiment.artifact_location == own


@pytest.mark.parametrize(
    ("path", "folder", "root", "stored"),
    [
        ("/p/runs/predictions", "/p/runs/evaluate/e", "/p/runs", "../../predictions"),
        ("/p/runs/predictions", "/p/runs/evaluate/e/reference", "/p/runs", "../../../predictions"),
        ("/p/runs/train/t/model", "/p/runs/train/t", "/p/runs/train/t", "model"),
        ("/data/vae.npz", "/p/runs/evaluate/e", "/p/runs", "/data/vae.npz"),
        ("/p/runs2/predictions", "/p/runs/evaluate/e", "/p/runs", "/p/runs2/predictions"),
        ("/p/runs/predictions", "/elsewhere/e", "/p/runs", "/p/runs/predictions"),
        ("s3://bucket/predictions", "/p/runs/evaluate/e", "/p/runs", "s3://bucket/predictions"),
    ],
)
def test_paths_are_stored_relative_to_the_run_folder_if_both_move_together(
    path: str, folder: str, root: str, stored: str
) -> None:
    assert stored_path(path, Path(folder), Path(root)) == stored
