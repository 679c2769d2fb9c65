"""The manifest of a checkpoint: provenance, the checksums of its files, and a digest of its content."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

import parcelray
from parcelray.config.base import StrictModel
from parcelray.errors import UserError
from parcelray.files import INDEX, atomic_write
from parcelray.models.host_cache import remembered_digest

MANIFEST_NAME = "manifest.json"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".h5", ".msgpack"})
_CARD_NAME = "README.md"
"""The model card, which is written after the weights and may change, so the manifest does not cover it."""


class ManifestEntry(StrictModel):
    """The checksum and size of one file of a checkpoint."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the content, hexadecimal."""
    bytes: int = Field(ge=0)
    """Size in bytes."""


class Manifest(StrictModel):
    """The provenance of a checkpoint, and the checksums of its files."""

    format: Literal[1] = 1
    """Version of the manifest format."""
    created: str
    """Time of creation in UTC, ISO 8601."""
    parcelray_version: str
    """Version of parcelray that wrote the checkpoint."""
    git_commit: str | None
    """Git commit of the training code; None outside a work tree."""
    seed: int | None
    """Seed of the training run."""
    data: Any
    """Description of the training data, as JSON."""
    config: Any
    """Resolved configuration of the run, as JSON."""
    extra: dict[str, Any]
    """Other information, such as scores."""
    files: dict[str, ManifestEntry]
    """Files by path relative to the folder, with `/` as separator."""


def content_digest(folder: Path) -> str:
    """Returns `sha256:DIGEST` over the files of a checkpoint; it does not depend on the location of the folder.

    If the folder has a manifest, its checksums are used, and the files are not read.
    """
    _refuse_unusable(folder)
    has_manifest = (folder / MANIFEST_NAME).is_file()
    return files_digest(read_manifest(folder).files if has_manifest else hash_files(checkpoint_files(folder)))


def verified_digest(folder: Path) -> str:
    """Returns the same as `content_digest`, after a comparison of all files with the manifest, if there is one.

    Raises:
        UserError: the folder has pickles or no safetensors, or a file differs from the manifest.
    """
    _refuse_unusable(folder)

    def compute() -> str:
        has_manifest = (folder / MANIFEST_NAME).is_file()
        return files_digest(verify_manifest(folder).files if has_manifest else hash_files(checkpoint_files(folder)))

    return remembered_digest(folder, compute)


def _refuse_unusable(folder: Path) -> None:
    refuse_pickles(folder)
    require_safetensors(folder)


def files_digest(files: Mapping[str, ManifestEntry]) -> str:
    """Returns the content digest of a checkpoint with these files."""
    lines = "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(files.items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def require_safetensors(folder: Path) -> None:
    """Refuses a folder without *.safetensors.

    Raises:
        UserError: there is no such file.
    """
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no *.safetensors file, and weights in other formats are never loaded; convert them with"
            " save_pretrained."
        )


def refuse_pickles(folder: Path) -> None:
    """Refuses a folder that contains a file in a format that can run code on loading, or could be mistaken for weights.

    Raises:
        UserError: the message names the first such file.
    """
    for name, path in checkpoint_files(folder).items():
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise UserError(
                f"{folder} contains {name}, a format that can run code when it is loaded; remove it, and store weights"
                " as *.safetensors."
            )


def write_manifest(
    folder: Path,
    *,
    config: object,
    git_commit: str | None,
    data: object,
    seed: int | None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes manifest.json, atomically, with the checksums of all files that are in the folder now.

    Args:
        folder: a finished checkpoint.
        config: resolved configuration of the run; JSON-serialisable, as `data` and `extra`.
        git_commit: commit of the code; None if unknown.
        data: description of the training data.
        seed: seed of the run.
        extra: other information, such as scores.

    Returns:
        Path of the manifest.
    """
    manifest = Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parcelray_version=parcelray.__version__,
        git_commit=git_commit,
        seed=seed,
        data=data,
        config=config,
        extra=dict(extra or {}),
        files=hash_files(checkpoint_files(folder)),
    )
    path = folder / MANIFEST_NAME
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())
    return path


def read_manifest(folder: Path) -> Manifest:
    """Reads manifest.json without checking the files that it lists.

    Raises:
        UserError: the file is missing or is not a manifest.
    """
    try:
        return parse_manifest((folder / MANIFEST_NAME).read_bytes(), str(folder))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {MANIFEST_NAME}; write one with write_manifest, or train and export the checkpoint again."
        ) from error


def parse_manifest(content: bytes, folder: str) -> Manifest:
    """Parses the content of a manifest.json.

    Args:
        content: the file.
        folder: where it is, for messages.

    Raises:
        UserError: it is not a manifest.
    """
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"{folder}/{MANIFEST_NAME} is not a manifest of format 1:"
            f" {'.'.join(map(str, problem['loc'])) or 'content'}: {problem['msg']}."
        ) from error
    return manifest


def verify_manifest(folder: Path) -> Manifest:
    """Compares the files of a folder with its manifest, sizes before checksums.

    Raises:
        UserError: the message names the file that is missing, not listed, or different.
    """
    manifest = read_manifest(folder)
    remedy = "download or copy the checkpoint again"
    present = checkpoint_files(folder)
    for name, entry in manifest.files.items():
        if name not in present:
            raise UserError(f"{folder} lacks {name}, which its manifest lists; {remedy}.")
        size = present[name].stat().st_size
        if size != entry.bytes:
            raise UserError(f"{name} in {folder} has {size} bytes, but its manifest lists {entry.bytes}; {remedy}.")
    for name, path in present.items():
        if name not in manifest.files:
            raise UserError(f"{folder} contains {name}, which its manifest does not list; remove it or {remedy}.")
        digest = _sha256(path)
        if digest != manifest.files[name].sha256:
            raise UserError(
                f"{name} in {folder} has SHA-256 {digest}, but its manifest lists {manifest.files[name].sha256};"
                f" {remedy}."
            )
    return manifest


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Returns the files of a checkpoint that a manifest lists, by path relative to the folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        name: path
        for path in paths
        if (name := path.relative_to(folder).as_posix()) not in (MANIFEST_NAME, _CARD_NAME, INDEX)
    }


def hash_files(files: Mapping[str, Path]) -> dict[str, ManifestEntry]:
    """Returns checksum and size of files, by name."""
    return {name: ManifestEntry(sha256=_sha256(path), bytes=path.stat().st_size) for name, path in files.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
