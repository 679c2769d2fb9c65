"""The folder for Ray's sessions and lock files belongs to the current user."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from parcelray.cluster.session import temporary_folder
from parcelray.errors import UserError


@pytest.fixture
def system_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, with RAY_TMPDIR unset."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_chosen_by_the_user_is_used(system_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/somewhere")
    assert temporary_folder() == Path("/somewhere")
    assert not list(system_folder.iterdir())


def test_the_default_folder_can_be_opened_only_by_the_user(system_folder: Path) -> None:
    folder = temporary_folder()
    assert folder == system_folder / f"parcelray-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert temporary_folder() == folder, "the next command reuses the folder"


@pytest.mark.parametrize("what", ["link", "open to others", "file"])
def test_a_path_that_other_users_can_change_is_rejected(system_folder: Path, what: str) -> None:
    folder = system_folder / f"parcelray-{os.getuid()}"
    if what == "link":
        (system_folder / "target").mkdir(mode=0o700)
        folder.symlink_to(system_folder / "target")
    elif what == "file":
        folder.touch(mode=0o600)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(UserError, match="RAY_TMPDIR"):
        temporary_folder()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_rejected(system_folder: Path) -> None:
    folder = system_folder / f"parcelray-{os.getuid()}"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with pytest.raises(UserError, match="only you can open"):
        temporary_folder()


def test_a_path_that_ray_cannot_encode_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/somewhere/\u00e4")
    with pytest.raises(UserError, match="outside ASCII"):
        temporary_folder()
