"""The commands that list, copy and delete stored runs, on a disk and on object storage."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from parcelray.errors import UserError
from parcelray.files import open_storage
from parcelray.tracking.runs import list_runs, prune_runs, pull_run

FILES: dict[str, Any] = {
    "train/done/job.json": {"identity": "train-done-1"},
    "train/done/result.json": {},
    "train/done/model/model.safetensors": "weights",
    "train/done/in-process/checkpoint_1/state.json": {},
    "train/done/in-process/checkpoint_1/model/config.json": {},
    "train/done/in-process/checkpoint_2/state.json": {},
    "train/stopped/job.json": {"identity": "train-stopped-2"},
    "train/stopped/train-stopped-2/checkpoint_1/state.json": {},
    "tune/search/job.json": {"identity": "tune-search-3", "pins": {"m": "sha256:1111222233334444ffff"}},
    "tune/search/trials/train/a-1/in-process/checkpoint_1/state.json": {},
    "evaluate/e/job.json": {"identity": "evaluate-e-4"},
    "evaluate/e/result.json": {},
    "evaluate/e/evaluation.json": {
        "digest": "sha256:aaaabbbbccccddddffff",
        "benchmarks": [{"config": {"name": "mini"}}],
    },
    "promote/p/run1/verdict-v1-1.json": {},
    "predictions/mini/aaaabbbbccccdddd/1.parquet": "used",
    "predictions/mini/1111222233334444/1.parquet": "of a search",
    "predictions/mini/0000000000000000/1.parquet": "unused",
    "predictions/nlvr/aaaabbbbccccdddd/1.parquet": "unused benchmark",
}


@pytest.fixture(params=["path", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The storage with all files."""
    root = {"path": f"{tmp_path}/runs", "memory": f"memory://{tmp_path}/runs"}.get(request.param)
    root = root or f"{request.getfixturevalue('s3')}/runs"
    _write(root, FILES)
    return root


def _write(storage: str, files: Mapping[str, Any]) -> None:
    filesystem, root = open_storage(storage)
    for name, content in files.items():
        path = f"{root}/{name}"
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, (content if isinstance(content, str) else json.dumps(content)).encode())


def _files(storage: str) -> set[str]:
    filesystem, root = open_storage(storage)
    return {name.removeprefix(f"{root}/") for name in filesystem.find(root)}


def test_all_runs_are_listed_with_their_state(storage: str) -> None:
    found = list_runs(storage)
    shown = {run.name: (run.identity, run.state, run.checkpoints) for run in found.runs}
    assert shown == {
        "train/done": ("train-done-1", "finished", 2),
        "train/stopped": ("train-stopped-2", "unfinished", 1),
        "tune/search": ("tune-search-3", "unfinished", 1),
        "evaluate/e": ("evaluate-e-4", "finished", 0),
        "promote/p": ("", "finished", 0),
    }
    assert found.predictions_bytes == len("usedof a searchunusedunused benchmark")
    assert found.to_rich().row_count == 6


def test_a_run_is_copied_without_checkpoints_and_the_copy_is_resumed(storage: str, tmp_path: Path) -> None:
    copied: list[str] = []
    folder = pull_run("train/done", storage, tmp_path / "laptop", on_file=copied.append)
    assert folder == tmp_path / "laptop" / "train" / "done"
    assert _files(str(folder)) == {"job.json", "result.json", "model/model.safetensors"}
    (folder / "model" / "model.safetensors").write_bytes(b"cut")
    assert len(copied) == 3
    again = pull_run(
        f"{storage}/train/done" if "://" in storage else "train/done",
        storage,
        tmp_path / "laptop",
        checkpoints=True,
        on_file=copied.append,
    )
    assert again == folder
    assert copied[3:] == [
        "train/done/in-process/checkpoint_1/model/config.json",
        "train/done/in-process/checkpoint_1/state.json",
        "train/done/in-process/checkpoint_2/state.json",
        "train/done/model/model.safetensors",
    ]
    assert (folder / "model" / "model.safetensors").read_text() == "weights"


def test_an_evaluation_is_copied_with_its_predictions(storage: str, tmp_path: Path) -> None:
    pull_run("evaluate/e", storage, tmp_path / "laptop")
    assert _files(str(tmp_path / "laptop")) == {
        "evaluate/e/job.json",
        "evaluate/e/result.json",
        "evaluate/e/evaluation.json",
        "predictions/mini/aaaabbbbccccdddd/1.parquet",
    }


@pytest.mark.parametrize(
    ("options", "deleted"),
    [
        ({"names": ["train/stopped"]}, {"train/stopped"}),
        ({"names": ["train/done", "evaluate/e"]}, {"train/done", "evaluate/e"}),
        (
            {"names": ["train/done", "train/stopped"], "checkpoints": True},
            {"train/done/in-process/checkpoint_1", "train/done/in-process/checkpoint_2"},
        ),
        ({"older_than_days": 1.0}, set()),
        (
            {"older_than_days": 0.0, "checkpoints": True},
            {"train/done/in-process/checkpoint_1", "train/done/in-process/checkpoint_2"},
        ),
        ({"predictions": True}, {"predictions/mini/0000000000000000", "predictions/nlvr/aaaabbbbccccdddd"}),
        ({"predictions": True, "older_than_days": 1.0}, set()),
    ],
)
def test_what_is_selected_is_deleted(options: dict[str, Any], deleted: set[str], tmp_path: Path) -> None:
    storage = f"memory://{tmp_path}"
    _write(storage, FILES)
    planned = prune_runs(storage, **options)
    assert planned.paths.keys() == deleted
    assert _files(storage) == FILES.keys(), "nothing is deleted without `delete`"
    assert prune_runs(storage, **options, delete=True).paths == planned.paths
    left = {name for name in FILES if not any(name.startswith(f"{path}/") for path in deleted)}
    assert _files(storage) == left


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("train/none", "has no run train/none"),
        ("../runs", r"'../runs' is not a run; write KIND/NAME"),
        ("predictions/mini", "'predictions/mini' is not a run"),
        ("train/..", "'train/..' is not a run"),
    ],
)
def test_what_is_no_run_is_refused(run: str, message: str, tmp_path: Path) -> None:
    _write(str(tmp_path), FILES)
    with pytest.raises(UserError, match=message):
        pull_run(run, str(tmp_path), tmp_path / "copy")
    with pytest.raises(UserError, match=message):
        prune_runs(str(tmp_path), [run], delete=True)


def test_a_prune_without_a_selection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing is selected; name runs as KIND/NAME, or set --older-than DAYS"):
        prune_runs(str(tmp_path))
    with pytest.raises(UserError, match="leave out the names of runs"):
        prune_runs(str(tmp_path), ["train/done"], predictions=True)
    with pytest.raises(UserError, match="does not exist"):
        list_runs(str(tmp_path / "none"))


def test_an_object_whose_name_leads_out_of_the_run_is_not_copied(s3: str, tmp_path: Path) -> None:
    _write(f"{s3}/runs", {"train/tiny/job.json": {"identity": "train-tiny-1"}, "train/tiny/a/../../../../x": "1"})
    with pytest.raises(UserError, match=r"has an object a/\.\./\.\./\.\./\.\./x, which is outside of the run"):
        pull_run("train/tiny", f"{s3}/runs", tmp_path / "here" / "runs")
    assert not (tmp_path / "x").exists()
