"""Files of runs: complete or not there, empty ones count as missing, and failures of the machine are one sentence."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from rich.console import Console
from s3fs.errors import translate_boto_error

from parcelray.cli import main
from parcelray.cli.scripts import run_script
from parcelray.errors import SystemFailure, UserError
from parcelray.files import (
    INDEX,
    atomic_write,
    download_files,
    explained_failure,
    is_written,
    open_storage,
    read_json,
    upload_files,
    write_json,
)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """A path that does not exist yet, and its file system."""
    if request.param == "local":
        yield f"{tmp_path}/new/folder/a.json", fsspec.filesystem("file")
        return
    memory = fsspec.filesystem("memory")
    yield "/new/folder/a.json", memory
    memory.store.clear()


def test_a_file_is_written_and_read(place: tuple[str, Any]) -> None:
    path, filesystem = place
    assert read_json(path, "remove it", filesystem) is None
    for content in ({"a": 1}, {"a": [2, "\u00e4"]}):
        write_json(path, content, filesystem)
        assert read_json(path, "remove it", filesystem) == content
    assert [name.rpartition("/")[2] for name in filesystem.ls(path.rpartition("/")[0], detail=False)] == ["a.json"]


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def write() -> None:
        with atomic_write(path) as file:
            file.write(b'{"new": ')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert read_json(path, "") == {"old": True}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("parcelray.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": True})
    assert read_json(path, "") == {"old": True}
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_empty_file_counts_as_missing_and_a_cut_one_is_named(place: tuple[str, Any]) -> None:
    path, filesystem = place
    with atomic_write(path, filesystem):
        pass
    assert filesystem.exists(path)
    assert not is_written(path, filesystem)
    assert read_json(path, "remove it", filesystem) is None
    with atomic_write(path, filesystem) as file:
        file.write(b'{"a": ')
    with pytest.raises(SystemFailure, match=r"a\.json is damaged: it is not JSON .*; remove it\.$"):
        read_json(path, "remove it", filesystem)


def test_a_folder_is_copied_by_its_index_also_without_listings(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "weights").write_bytes(b"1234")
    (source / "empty").touch()
    (source / "job.json").write_text("{}")
    filesystem, path = open_storage(s3)
    assert not download_files(filesystem, path, target)
    upload_files(source, filesystem, path, leave_out=("job.json",))
    assert sorted(name.removeprefix(f"{path}/") for name in filesystem.find(path)) == [INDEX, "deep/weights", "empty"]
    with monkeypatch.context() as late:
        late.setattr(filesystem, "find", lambda *_, **__: {})
        assert download_files(filesystem, path, target)
    assert (target / "deep" / "weights").read_bytes() == b"1234"
    assert not (target / "job.json").exists()
    filesystem.pipe_file(f"{path}/deep/weights", b"12")
    (target / "deep" / "weights").unlink()
    assert not download_files(filesystem, path, target), "a file is cut off"
    filesystem.rm_file(f"{path}/deep/weights")
    (target / "deep" / "weights").unlink()
    assert not download_files(filesystem, path, target), "a file is missing"
    # Without an index, the files of a listing are copied.
    filesystem.rm_file(f"{path}/{INDEX}")
    assert download_files(filesystem, path, tmp_path / "listed")
    assert (tmp_path / "listed" / "empty").exists()


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_an_index_with_a_path_outside_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    memory, path = open_storage(f"memory://{tmp_path}")
    write_json(f"{path}/{INDEX}", {name: 1}, memory)
    with pytest.raises(UserError, match="is outside of the folder"):
        download_files(memory, path, tmp_path / "target")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/runs", r"gs://bucket/runs needs a package that is not installed .*; run `pip install gcsfs` on"),
        ("nothing://bucket", r"nothing://bucket is not storage .*; use a folder, s3://BUCKET/FOLDER or gs://"),
    ],
)
def test_a_scheme_that_cannot_be_opened_is_refused(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_storage(uri)


def _denied() -> Exception:
    answer = {"Error": {"Code": "AccessDenied", "Message": "Access Denied"}}
    error: Exception = translate_boto_error(ClientError(answer, "PutObject"))
    return error


FAILURES: list[tuple[Exception, str]] = [
    (
        OSError(errno.ENOSPC, "No space left on device", "/runs/a"),
        r"^/runs/a: there is no space left on its disk; free",
    ),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "/runs/a"), r"^/runs/a: the disk quota is exhausted"),
    (OSError(errno.EROFS, "Read-only file system", "/runs/a"), r"^/runs/a: its file system is read-only; use storage"),
    (PermissionError(errno.EACCES, "Permission denied", "/runs/a"), r"^/runs/a: permission is denied"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"/runs/a"), r"^/runs/a: a part of this path is a file"),
    (FileExistsError(errno.EEXIST, "File exists", "/runs"), r"^/runs: it is a file, but must be a folder"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "/runs/a"), r"^/runs/a: it is a folder, but must be a file"),
    (OSError(errno.EIO, "Input/output error", "/runs/a"), r"^/runs/a: its disk reports an input/output error"),
    (OSError(errno.ENOSPC, "No space left on device", "/runs/b", None, "/runs/a"), r"^/runs/a: there is no space"),
    (
        EndpointConnectionError(endpoint_url="http://store"),
        r"^the object storage failed \(Could not connect to the endpoint URL: .http://store.\); check its address",
    ),
    (_denied(), r"^the object storage failed \(Access Denied\); check its address, the bucket and the credentials"),
    (OSError(errno.ENOSPC, "error writing bytes"), r"^error writing bytes: there is no space left"),
]


@pytest.mark.parametrize(("error", "sentence"), FAILURES)
def test_a_failure_of_the_machine_is_one_sentence_and_exit_code_1(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("parcelray.cli.app", fail)
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith("failed: ")
    assert len(shown.splitlines()) == 1
    reason = explained_failure(error)
    assert reason is not None
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(reason)
    assert run_script(fail) == 1
    assert reason in capsys.readouterr().out.replace("\n", "")


def test_an_error_that_is_no_failure_of_the_machine_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(console: Console | None = None) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/runs/a")

    monkeypatch.setattr("parcelray.cli.app", fail)
    with pytest.raises(FileNotFoundError):
        main()
    with pytest.raises(FileNotFoundError):
        run_script(fail)
