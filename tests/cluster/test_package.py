"""Packages of git-tracked files: contents, links, secrets and size."""

import subprocess
from pathlib import Path

import pytest

from parcelray.cluster.package import collect, find_secret, git_state, project_root, stage
from parcelray.errors import UserError

# Concatenated, so that this file itself passes the check for secrets.
PRIVATE_KEY = "-----BEGIN " + "RSA PRIVATE KEY-----\nabc"
ACCESS_TOKEN = "hf_" + "a1B2" * 9


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "jobs").mkdir(parents=True)
    (root / "jobs" / "a.yaml").write_text("kind: train\n")
    (root / ".gitignore").write_text("runs/\n")
    (root / "untracked.txt").write_text("stays here")
    git(root, "init", "-q")
    git(root, "add", "jobs", ".gitignore")
    return root


def add(root: Path, name: str, content: str) -> None:
    (root / name).write_text(content)
    git(root, "add", "--force", name)


def test_a_package_contains_exactly_the_tracked_and_staged_files(project: Path) -> None:
    add(project, "staged.py", "x = 1\n")
    package = collect(project)
    assert [file.name for file in package.files] == [".gitignore", "jobs/a.yaml", "staged.py"]
    assert package.num_bytes == len("runs/\n") + len("kind: train\n") + len("x = 1\n")


def test_an_untracked_job_file_is_included_when_given(project: Path) -> None:
    (project / "jobs" / "new.yaml").write_text("kind: tune\n")
    assert "jobs/new.yaml" in [file.name for file in collect(project, [project / "jobs" / "new.yaml"]).files]


def test_a_file_outside_of_the_project_is_rejected(project: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("kind: train\n")
    with pytest.raises(UserError, match=r"other\.yaml is outside of the project"):
        collect(project, [tmp_path / "other.yaml"])


def test_a_deleted_tracked_file_is_skipped(project: Path) -> None:
    add(project, "gone.py", "")
    (project / "gone.py").unlink()
    assert "gone.py" not in [file.name for file in collect(project).files]


@pytest.mark.parametrize("target", ["../../outside.txt", "../untracked.txt", "../.git/config"])
def test_a_link_to_a_file_outside_of_the_package_is_rejected(project: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "outside.txt").write_text("secret")
    (project / "jobs" / "link").symlink_to(target)
    git(project, "add", "jobs/link")
    with pytest.raises(UserError, match=r"jobs/link is a link to .* not part of the package"):
        collect(project)


def test_a_link_within_the_package_is_copied_as_a_file(project: Path, tmp_path: Path) -> None:
    (project / "jobs" / "same.yaml").symlink_to("a.yaml")
    git(project, "add", "jobs/same.yaml")
    stage(collect(project), tmp_path / "copy")
    copy = tmp_path / "copy" / "jobs" / "same.yaml"
    assert not copy.is_symlink()
    assert copy.read_text() == "kind: train\n"
    assert not (tmp_path / "copy" / "untracked.txt").exists()
    assert not (tmp_path / "copy" / ".gitignore").exists()


@pytest.mark.parametrize("name", [".env", ".env.production", "server.key", "id_ed25519", "auth_token"])
def test_a_file_with_the_name_of_a_secret_is_rejected(project: Path, name: str) -> None:
    add(project, name, "x")
    with pytest.raises(UserError, match="has the file name of a secret"):
        collect(project)


def test_a_template_of_an_environment_file_is_accepted(project: Path) -> None:
    add(project, ".env.example", "TOKEN=\n")
    assert ".env.example" in [file.name for file in collect(project).files]


@pytest.mark.parametrize("content", [PRIVATE_KEY, f"token: {ACCESS_TOKEN}"])
def test_a_file_that_contains_a_secret_is_rejected_without_repeating_the_secret(project: Path, content: str) -> None:
    add(project, "notes.md", content)
    with pytest.raises(UserError, match=r"notes\.md contains text that looks like") as caught:
        collect(project)
    assert ACCESS_TOKEN not in str(caught.value)


def test_ordinary_text_is_not_taken_for_a_secret() -> None:
    assert not find_secret(b"hf_hub, AKIA, sha256 0123456789abcdef0123456789abcdef, models:/parcel@champion")


def test_a_package_above_the_limit_names_the_five_largest_files(project: Path) -> None:
    for size in range(1, 8):
        add(project, f"weights{size}.bin", "x" * size * 100_000)
    with pytest.raises(UserError, match=r"2\.7 MiB, but the limit is 1\.0 MiB") as caught:
        collect(project, max_bytes=1024**2)
    message = str(caught.value)
    assert message.index("weights7.bin (0.7 MiB)") < message.index("weights3.bin")
    assert "weights2.bin" not in message


def test_a_folder_outside_of_git_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a git working tree"):
        project_root(tmp_path)


def test_git_state_before_and_after_the_first_commit(project: Path) -> None:
    assert git_state(project) == ("none", True)
    git(project, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "first")
    commit, dirty = git_state(project)
    assert len(commit) == 40
    assert not dirty
    (project / "jobs" / "a.yaml").write_text("kind: tune\n")
    assert git_state(project) == (commit, True)
