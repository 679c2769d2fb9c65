"""Resolves model references once to files that are pinned, verified and free of pickle.

A reference is a local folder, the name of a checkpoint in the package (`PACKAGED`), `models:/NAME@ALIAS`,
`models:/NAME/VERSION`, or a Hugging Face id `ORG/NAME` or `ORG/NAME@REVISION`. Reports and serving use the pinned form,
never the alias or branch.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

import parcelray
from parcelray.config.base import StrictModel
from parcelray.config.paths import PACKAGED
from parcelray.errors import UserError
from parcelray.files import INDEX, atomic_write

MANIFEST_NAME = "manifest.json"
MINI_BASE = "mini_base"
_CARD_NAME = "README.md"
"""The model card, which is written after the weights and may change, so the manifest does not cover it."""
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".h5", ".msgpack"})
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")

RegistryResolver = Callable[[str], tuple[Path, str]]
"""Maps `models:/NAME@ALIAS` or `models:/NAME/VERSION` to a local folder and `models:/NAME/VERSION`.

See `tracking.registry`.
"""


class ResolvedCheckpoint(NamedTuple):
    """A model reference, and the files that it was resolved to."""

    path: Path
    """Local folder with config.json and *.safetensors."""
    reference: str
    """The reference as the user wrote it."""
    pinned: str
    """The pinned reference: `models:/NAME/VERSION`, `hf:ID@COMMIT` or `sha256:DIGEST` of the files."""


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


def resolve_checkpoint(
    reference: str | Path,
    *,
    registry_resolver: RegistryResolver | None = None,
    verify: bool = True,
) -> ResolvedCheckpoint:
    """Resolves a model reference to local files; called once per job, by the driver.

    Args:
        reference: see the module's docstring. If both a folder and a Hugging Face id match, the folder is used.
        registry_resolver: resolver for `models:/...`, that is,
            `functools.partial(tracking.registry.resolve_registry, tracking_uri=...)`.
        verify: compare every file with the manifest, if the folder has one (reads all weights).

    Returns:
        The folder and the pinned reference.

    Raises:
        UserError: the reference cannot be resolved, the files differ from the manifest, or they include pickles.
    """
    text = str(reference)
    if text.startswith("models:/"):
        return _resolve_registry(text, registry_resolver, verify)
    if text in PACKAGED:
        folder = Path(parcelray.__file__).parent / "assets" / text
        if not folder.is_dir():
            raise UserError(
                f"this installation of parcelray does not contain the checkpoint {text!r}; give a folder,"
                " models:/NAME@ALIAS or a Hugging Face id."
            )
        return ResolvedCheckpoint(folder, text, _check_folder(folder, verify))
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return ResolvedCheckpoint(folder.resolve(), text, _check_folder(folder, verify))
    hub = _HUB_ID.fullmatch(text.removeprefix("hf:"))
    if hub is None or text.startswith((".", "~")):
        raise UserError(
            f"model reference {text!r} is neither an existing folder nor {', '.join(PACKAGED)}, models:/NAME@ALIAS,"
            " models:/NAME/VERSION or a Hugging Face id ORG/NAME[@REVISION]; check the path."
        )
    path, commit = _download(hub["repo"], hub["revision"])
    _require_safetensors(path)
    return ResolvedCheckpoint(path, text, f"hf:{hub['repo']}@{commit}")


def content_digest(folder: Path) -> str:
    """Returns `sha256:DIGEST` over the files of a checkpoint; it does not depend on the location of the folder."""
    return _check_folder(folder, verify=False)


def _resolve_registry(reference: str, resolver: RegistryResolver | None, verify: bool) -> ResolvedCheckpoint:
    if resolver is None:
        raise UserError(
            f"model reference {reference!r} needs a model registry; set a tracking URI, or give a folder or a Hugging"
            " Face id."
        )
    path, pinned = resolver(reference)
    _check_folder(path, verify)
    return ResolvedCheckpoint(path, reference, pinned)


def _check_folder(folder: Path, verify: bool) -> str:
    """Refuses a folder that must not be loaded; returns the digest of its content as `sha256:DIGEST`."""
    refuse_pickles(folder)
    _require_safetensors(folder)
    lines = "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(_entries(folder, verify).items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _entries(folder: Path, verify: bool) -> dict[str, ManifestEntry]:
    if not (folder / MANIFEST_NAME).is_file():
        return _hash_files(folder)
    return (verify_manifest(folder) if verify else read_manifest(folder)).files


def _require_safetensors(folder: Path) -> None:
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
    for name, path in _files(folder).items():
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
        files=_hash_files(folder),
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
    path = folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {MANIFEST_NAME}; write one with write_manifest, or train and export the checkpoint again."
        ) from error
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"{path} is not a manifest of format 1: {'.'.join(map(str, problem['loc'])) or 'content'}:"
            f" {problem['msg']}."
        ) from error


def verify_manifest(folder: Path) -> Manifest:
    """Compares the files of a folder with its manifest, sizes before checksums.

    Raises:
        UserError: the message names the file that is missing, not listed, or different.
    """
    manifest = read_manifest(folder)
    remedy = "download or copy the checkpoint again"
    present = _files(folder)
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


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        name: path
        for path in paths
        if (name := path.relative_to(folder).as_posix()) not in (MANIFEST_NAME, _CARD_NAME, INDEX)
    }


def _hash_files(folder: Path) -> dict[str, ManifestEntry]:
    return {
        name: ManifestEntry(sha256=_sha256(path), bytes=path.stat().st_size) for name, path in _files(folder).items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(repo: str, revision: str | None) -> tuple[Path, str]:
    """Downloads a Hub repository without pickles into the node's shared cache; returns its folder and commit."""
    from huggingface_hub import errors, snapshot_download

    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except errors.GatedRepoError as error:
        raise UserError(
            f"Hugging Face model {repo!r} is gated: accept its licence on its web page, and set HF_TOKEN to a token of"
            " that account."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"Hugging Face model {repo!r} has no revision {revision!r}; give one of its commits, branches or tags."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{repo!r} is neither a local folder nor an accessible Hugging Face model; check the spelling, or set"
            " HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{repo!r} is not a local folder, and as a Hugging Face model it is not in the local cache and the Hub"
            f" cannot be reached (offline?); download it on a machine with network access (`hf download {repo}`), or"
            " give a folder."
        ) from error
    except errors.HfHubHTTPError as error:
        raise UserError(
            f"the Hugging Face Hub refused {repo!r}: {error}; try again later, or give a folder."
        ) from error
    return path, path.name
