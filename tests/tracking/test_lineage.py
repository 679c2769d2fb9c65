"""Tags of the lineage of a run, and the runs of a submitted job."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from parcelray.tracking.lineage import MODEL_IN_TAG, MODEL_OUT_TAG, git_commit, lineage_tags, runs_of_jobs, user
from parcelray.tracking.mlflow_tracker import tracked_run

from ..stores import new_store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")
METADATA = {
    "job_submission_id": "train-a-00000000-r2",
    "user": "ann",
    "git_commit": "c" * 40,
    "git_dirty": "true",
    "job_file": "jobs/train/a.yaml",
}


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}, "metadata": METADATA}))
    monkeypatch.setenv("RAY_ADDRESS", "10.7.0.1:6379")


def test_a_command_on_this_machine_has_the_commit_of_its_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setenv("RAY_ADDRESS", "10.7.0.1:6379")
    commit = git_commit()
    assert commit is not None
    assert len(commit.removesuffix("-dirty")) == 40
    assert lineage_tags() == {"mlflow.source.git.commit": commit}
    assert user() == "ann"


@pytest.mark.parametrize(
    ("metadata", "commit"),
    [
        ({"git_commit": "c" * 40, "git_dirty": "false"}, "c" * 40),
        ({"git_commit": "c" * 40, "git_dirty": "true"}, "c" * 40 + "-dirty"),
        ({"git_commit": "none", "git_dirty": "true"}, None),
    ],
)
def test_a_submitted_job_has_the_commit_that_was_sent(
    monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str], commit: str | None
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": metadata}))
    assert git_commit() == commit


@pytest.mark.usefixtures("in_job")
def test_the_runs_of_a_submitted_job_are_found_with_their_models(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    with tracked_run(uri, "a", "train-a-00000000", params={}, tags={MODEL_IN_TAG: "mini_base"}) as run_id:
        client = MlflowClient(tracking_uri=uri)
        client.set_tag(run_id, MODEL_OUT_TAG, "sha256:12")
        with tracked_run(uri, "a", "evaluate-a-00000000", params={}, parent_run_id=run_id):
            pass
    client.create_registered_model("parcel")
    client.create_model_version("parcel", str(tmp_path / "model"), run_id)

    tags = client.get_run(run_id).data.tags
    assert tags["parcel.job"] == "train-a-00000000-r2"
    assert tags["parcel.cluster"] == "10.7.0.1:6379"
    assert tags["mlflow.source.git.commit"] == "c" * 40 + "-dirty"
    assert tags["mlflow.source.name"] == "jobs/train/a.yaml"
    assert tags["mlflow.user"] == "ann"

    (found,) = runs_of_jobs(uri, ["train-a-00000000", "train-a-00000000-r2"])
    assert (found.name, found.run_id, found.status) == ("train-a-00000000", run_id, "FINISHED")
    assert (found.model_in, found.model_out, found.versions) == ("mini_base", "sha256:12", ("models:/parcel/1",))
    assert runs_of_jobs(uri, ["train-b-00000000"]) == []
