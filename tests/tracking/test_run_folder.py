"""Run folders on a local disk and on other fsspec file systems: one configuration per name."""

import io
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from rich.console import Console

from parcelray.errors import UserError
from parcelray.files import is_local, open_storage
from parcelray.tracking.run_folder import RunFolder, local_folder, study_folder

from ..training.conftest import tiny_job


@pytest.fixture(params=["path", "file", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The storage of runs: a path, and three URIs."""
    if request.param == "s3":
        yield request.getfixturevalue("s3")
        return
    yield {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": "memory://"}[request.param]
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def _folder(storage: str, **changes: object) -> RunFolder:
    return RunFolder(tiny_job(Path(), **changes).model_copy(update={"storage": storage}))


def test_the_same_job_claims_its_folder_again(storage: str) -> None:
    folder = _folder(storage)
    folder.claim()
    again = _folder(storage, scaling={"num_workers": 2}, tracking={"uri": "sqlite:///elsewhere.db"})
    again.claim()
    assert folder.identity == again.identity
    assert folder.path == again.path
    assert folder.path.endswith("/train/tiny")


def test_another_configuration_under_the_same_name_is_refused_with_the_differing_keys(storage: str) -> None:
    _folder(storage).claim()
    other = _folder(storage, seed=4, training={"steps": 7}, scaling={"num_workers": 2})
    with pytest.raises(UserError, match=r"has the run train-tiny-\w{8}, whose configuration differs") as caught:
        other.claim()
    assert "(seed: 3 -> 4; training.steps: 6 -> 7)" in str(caught.value)
    _folder(storage, name="tiny2", seed=4).claim()


def test_of_two_drivers_that_claim_a_name_at_once_one_is_refused(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_local(_folder(storage).filesystem):
        pytest.skip("on a disk, the second claim follows within a millisecond")
    first, second = _folder(storage), _folder(storage, seed=4)
    check = second.check

    def check_and_lose_the_race() -> None:
        check()
        monkeypatch.setattr(second, "check", check)
        first.claim()

    monkeypatch.setattr(second, "check", check_and_lose_the_race)
    with pytest.raises(UserError, match="seed: 3 -> 4"):
        second.claim()
    assert first.names("") == ["job.json"]


def test_a_reference_with_changed_content_is_refused(storage: str) -> None:
    folder = _folder(storage)
    folder.claim({"runs/m": "sha256:1111"})
    folder.claim()
    folder.claim({"runs/other": "sha256:3333"})
    folder.claim({"runs/m": "sha256:1111"})
    with pytest.raises(
        UserError, match=r"with another model: the content of runs/m has changed \(sha256:1111 then, sha256:2222 now\)"
    ):
        folder.claim({"runs/m": "sha256:2222"})


def test_check_does_not_claim_the_folder(storage: str) -> None:
    _folder(storage).check()
    _folder(storage, seed=4).claim()
    with pytest.raises(UserError, match=r"seed: 4 -> 3"):
        _folder(storage).check()


@pytest.mark.parametrize(
    ("file", "is_kept"),
    [
        (None, False),
        ("{identity}/.validate_storage_marker", False),
        ("{identity}/checkpoint_manager_snapshot.json", False),
        ("{identity}/checkpoint_2026-01-01/state.json", True),
        ("in-process/checkpoint_00000003/state.json", True),
        ("result.json", True),
        ("trials.jsonl", True),
    ],
)
def test_a_run_that_fails_keeps_its_name_only_with_results(storage: str, file: str | None, is_kept: bool) -> None:
    folder, other = _folder(storage), _folder(storage, seed=4)
    if file is not None:
        path = f"{folder.path}/{file.format(identity=folder.identity)}"
        folder.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        folder.filesystem.pipe(path, b"{}")
    with pytest.raises(KeyError), folder.claimed():
        raise KeyError
    if is_kept:
        with pytest.raises(UserError, match="seed: 3 -> 4"):
            other.claim()
    else:
        assert not folder.filesystem.find(folder.path)
        other.claim()


def test_a_run_that_fails_does_not_take_the_folder_from_another_process(storage: str) -> None:
    _folder(storage).claim()
    with pytest.raises(KeyError), _folder(storage).claimed():
        raise KeyError
    with pytest.raises(UserError, match="seed: 3 -> 4"):
        _folder(storage, seed=4).claim()


def test_a_run_that_succeeds_keeps_its_name(storage: str) -> None:
    with _folder(storage).claimed():
        pass
    with pytest.raises(UserError, match="seed: 3 -> 4"):
        _folder(storage, seed=4).claim()


def test_a_finished_run_has_a_result(storage: str) -> None:
    folder = _folder(storage)
    folder.claim()
    assert folder.result() is None
    folder.finish({"metrics": {"train/loss": 0.5}})
    folder.finish({"metrics": {"train/loss": 0.25}})
    assert _folder(storage).result() == {"metrics": {"train/loss": 0.25}}
    assert sorted(Path(name).name for name in folder.filesystem.ls(folder.path, detail=False)) == [
        "job.json",
        "result.json",
    ]


def test_files_are_pushed_to_the_run_folder_and_pulled_from_it(storage: str) -> None:
    folder = _folder(storage)
    folder.claim()
    (folder.local / "model" / "deep").mkdir(parents=True)
    (folder.local / "model" / "config.json").write_text("{}")
    (folder.local / "model" / "deep" / "weights").write_bytes(b"123")
    folder.push("model")
    with folder.filesystem.open(f"{folder.path}/model/deep/weights", "rb") as file:
        assert file.read() == b"123"
    other = _folder(storage)
    assert other.pull("model")
    assert (other.local / "model" / "deep" / "weights").read_bytes() == b"123"
    assert (other.local / "model" / "config.json").read_text() == "{}"
    assert not other.pull("results")
    assert local_folder(f"{folder.uri}/model").joinpath("config.json").read_text() == "{}"


def test_only_the_newest_checkpoints_are_kept(storage: str) -> None:
    folder = _folder(storage)
    for parent in ("in-process", folder.identity):
        for number in (1, 2, 3):
            path = f"{folder.path}/{parent}/checkpoint_{number}/state.json"
            folder.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            folder.filesystem.pipe(path, b"{}")
    folder.keep_checkpoints(2)
    assert folder.names("in-process") == folder.names(folder.identity) == ["checkpoint_2", "checkpoint_3"]
    folder.keep_checkpoints(0)
    assert folder.names("in-process") == folder.names(folder.identity) == []


def test_only_a_local_folder_has_a_local_path(storage: str) -> None:
    folder = _folder(storage)
    if folder.is_local:
        assert folder.local_path("model") == Path(folder.path) / "model"
    else:
        with pytest.raises(UserError, match="but this study needs a folder; set storage to one"):
            folder.local_path("model")


def test_a_relative_storage_is_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(_folder("runs").path) == tmp_path / "runs" / "train" / "tiny"


def test_the_files_of_a_study_end_up_in_the_storage(storage: str) -> None:
    output = io.StringIO()
    with study_folder(storage, "studies/attention", Console(file=output, width=200)) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "numbers.json").write_text("{}")
    assert folder.name == "attention"
    filesystem, root = open_storage(storage)
    assert filesystem.cat_file(f"{root}/studies/attention/numbers.json") == b"{}"
    assert ("studies/attention" in output.getvalue()) == (not is_local(filesystem))
