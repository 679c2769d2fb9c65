"""The digest of a data folder."""

import shutil

import pytest

from parcelray.datasets import fingerprint
from parcelray.datasets.fingerprint import folder_digest
from parcelray.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Three files, one of them larger than what is read of it."""
    path = tmp_path / "data"
    (path / "train").mkdir(parents=True)
    (path / "train" / "0.parquet").write_bytes(bytes(range(256)) * 1024)
    (path / "train" / "1.parquet").write_bytes(b"second")
    (path / "card.md").write_text("card")
    return path


def test_a_copy_in_another_place_has_the_same_digest(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    assert folder_digest(copy) == folder_digest(str(folder))
    assert folder_digest(folder).startswith("sha256:")
    file = folder / "train" / "1.parquet"
    assert folder_digest(file) == folder_digest(shutil.copy(file, tmp_path / "other-name"))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "card.md").rename(folder / "renamed.md"),
        lambda folder: (folder / "train" / "1.parquet").unlink(),
        lambda folder: (folder / "train" / "1.parquet").write_bytes(b"another"),
        lambda folder: (folder / "train" / "1.parquet").write_bytes(b"thirds"),
        lambda folder: (folder / "train" / "0.parquet").write_bytes(bytes(range(256)) * 1023),
    ],
)
def test_names_sizes_and_sampled_content_count(folder, change):
    before = folder_digest(folder)
    change(folder)
    assert folder_digest(folder) != before


def test_a_large_folder_is_sampled(folder, monkeypatch):
    read = []

    def ends(path):
        read.append(path.name)
        return b""

    monkeypatch.setattr(fingerprint, "_SAMPLED_FILES", 2)
    monkeypatch.setattr(fingerprint, "_ends", ends)
    folder_digest(folder)
    assert read == ["card.md", "0.parquet"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere do not exist on the host"):
        folder_digest(tmp_path / "nowhere")
