"""The files that are sent with a job: git-tracked files, checked for links, secrets and size."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from parcelray.errors import UserError

MAX_PACKAGE_BYTES = 50 * 1024**2

_SECRET_NAMES = (
    "*.env",
    ".env.*",
    "*.key",
    "*.p12",
    "*.pfx",
    "id_rsa",
    "id_dsa",
    "id_ecdsa",
    "id_ed25519",
    "auth_token",
    ".netrc",
    ".pypirc",
    ".git-credentials",
)
_HARMLESS_NAMES = (".env.example", ".env.sample", ".env.template")
# Each alternative begins with a literal, and then checks that a word begins there. With `\b` in front of the literal,
# the search through the shipped weights would take ten times as long.
_SECRET_TEXT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    rb"|AKIA(?<!\wAKIA)[0-9A-Z]{16}\b"
    rb"|hf_(?<!\whf_)[A-Za-z0-9]{30,}\b"
    rb"|gh[opsu]_(?<!\wgh[opsu]_)[A-Za-z0-9]{36}\b"
    rb"|github_pat_(?<!\wgithub_pat_)[A-Za-z0-9_]{50,}\b"
    rb"|xox[baprs]-(?<!\wxox[baprs]-)[A-Za-z0-9-]{20,}\b"
)
_URL_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
# Upper case as in environment variables, lower case as in job files.
_SECRET_KEY = re.compile(r"(.*_)?(token|secret|passw(or)?d|credentials?|api_?key|access_key(_id)?)", re.IGNORECASE)
# Ray excludes the files listed in these files from the upload, even if git tracks them.
_IGNORE_FILES = (".gitignore", ".rayignore")


@dataclass(frozen=True)
class PackageFile:
    """One file of a package."""

    name: str
    """Path below the project, with forward slashes."""
    source: Path
    """Path of the content; for a link, the path of its target."""
    num_bytes: int
    """Size of the file in bytes."""


@dataclass(frozen=True)
class Package:
    """The files of a project that are sent with a job."""

    root: Path
    """Root of the project's git working tree."""
    files: tuple[PackageFile, ...]
    """All files, sorted by name."""

    @property
    def num_bytes(self) -> int:
        """Total size of all files in bytes."""
        return sum(file.num_bytes for file in self.files)


def project_root(path: Path) -> Path:
    """Finds the root of the git working tree that contains a path.

    Raises:
        UserError: the path does not exist or is not in a git working tree.
    """
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise UserError(f"{path} does not exist; give a job file inside the project.")
    return Path(_git(folder, "rev-parse", "--show-toplevel").strip()).resolve()


def collect(root: Path, extra: Iterable[Path] = (), *, max_bytes: int = MAX_PACKAGE_BYTES) -> Package:
    """Lists all files that git tracks or that are staged, with their current content on disk, plus `extra`.

    Args:
        root: root of the project's git working tree.
        extra: further files inside the project, such as an untracked job file.
        max_bytes: limit for the total size in bytes.

    Raises:
        UserError: the package contains a link to a file outside of it, a file that looks like a secret or a submodule,
            or it exceeds the limit (the message names the five largest files).
    """
    root = root.resolve()
    names = {name for name in _git(root, "ls-files", "-z", "--cached").split("\0") if name}
    names |= {inside(root, path) for path in extra}
    present = sorted(name for name in names if (root / name).is_symlink() or (root / name).exists())
    if not present:
        raise UserError(f"git tracks no files in {root}; run `git add` on the files that the job needs.")
    files = tuple(_checked(root, name, names) for name in present)
    package = Package(root=root, files=files)
    if package.num_bytes > max_bytes:
        largest = sorted(files, key=lambda file: -file.num_bytes)[:5]
        raise UserError(
            f"The package has {_mib(package.num_bytes)}, but the limit is {_mib(max_bytes)}; the largest files are "
            + ", ".join(f"{file.name} ({_mib(file.num_bytes)})" for file in largest)
            + ". Keep data and weights out of git: put them on shared storage and set their paths in the job file."
        )
    return package


def stage(package: Package, folder: Path) -> None:
    """Copies the files of a package into an empty folder; links are replaced by their targets."""
    for file in package.files:
        if Path(file.name).name in _IGNORE_FILES:
            continue
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file.source, target)


def inside(root: Path, path: Path) -> str:
    """Returns the path relative to the project's root.

    Raises:
        UserError: the path is outside of the project.
    """
    resolved = path.resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise UserError(f"{path} is outside of the project {root}; give a file inside the project.")
    return resolved.relative_to(root.resolve()).as_posix()


def find_secret(text: bytes) -> bool:
    """Whether the bytes contain a private key or an access token of a well-known service, judged by its format."""
    return _SECRET_TEXT.search(text) is not None


def secret_settings(settings: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Finds secrets in settings that are sent with a job, by the names of keys and the format of values.

    Args:
        settings: nested mappings and lists.
        path: key path of the settings.

    Yields:
        The key path of each secret, and what is wrong with it; the secret itself is not part of the text.
    """
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            where = f"{path}.{key}" if path else str(key)
            if isinstance(value, str) and value and _SECRET_KEY.fullmatch(str(key)):
                yield where, "has the name of a secret"
            yield from secret_settings(value, where)
    elif isinstance(settings, Sequence) and not isinstance(settings, str):
        for index, value in enumerate(settings):
            yield from secret_settings(value, f"{path}.{index}")
    elif isinstance(settings, str) and find_secret(settings.encode()):
        yield path, "contains text that looks like an access token or a private key"
    elif isinstance(settings, str) and _URL_PASSWORD.search(settings):
        yield path, "contains a URL with a password"


def git_state(root: Path) -> tuple[str, bool]:
    """Returns the current commit (`none` before the first one) and whether tracked files differ from it."""
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--verify", "-q", "HEAD"], capture_output=True, text=True, check=False
    )
    commit = head.stdout.strip() or "none"
    return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip())


def _checked(root: Path, name: str, names: set[str]) -> PackageFile:
    path = root / name
    source = path.resolve()
    if not source.is_relative_to(root) or source.relative_to(root).as_posix() not in names:
        raise UserError(
            f"{name} is a link to {source}, which is not part of the package; replace the link by the file, or remove"
            " the link from git."
        )
    if source.is_dir():
        raise UserError(
            f"{name} is a git submodule, but only plain files can be sent; copy the files that the job needs into the"
            " project."
        )
    for each in (path, source):
        if any(fnmatch(each.name, pattern) for pattern in _SECRET_NAMES) and each.name not in _HARMLESS_NAMES:
            raise UserError(
                f"{name} has the file name of a secret and would be readable on the cluster; remove it from git (`git"
                f" rm --cached {name}`)."
            )
    if find_secret(source.read_bytes()):
        raise UserError(
            f"{name} contains text that looks like a private key or an access token; remove it, and revoke it if it was"
            " ever pushed."
        )
    return PackageFile(name=name, source=source, num_bytes=source.stat().st_size)


def _git(folder: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise UserError(
            "git is not installed, but a job is sent with the files that git tracks; install git."
        ) from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[0] if error.stderr.strip() else f"git exited with {error.returncode}"
        raise UserError(
            f"{folder} cannot be read as a git working tree ({reason}); submit jobs from a clone of the project."
        ) from error


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 1024**2:.1f} MiB"
