"""Model references and what they stand for: resolved once, to files that are pinned, checked, and free of pickle.

A reference is a local folder, the name of a checkpoint in the package (`PACKAGED`), `models:/NAME@ALIAS`,
`models:/NAME/VERSION`, or a Hugging Face id `ORG/NAME`, `ORG/NAME@REVISION`. What is reported and served is the pinned
form, never the alias or branch.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

import parcelray
from parcelray.config.base import StrictModel
from parcelray.errors import UserError

MANIFEST_NAME = "manifest.json"
MINI_BASE = "mini_base"
PACKAGED = (MINI_BASE, "mini_llava", "mini_llava_siglip", "mini_llava_convnext")
"""Checkpoints that the package ships."""
_CARD_NAME = "README.md"
"""A checkpoint's card: text for people, written after the weights and free to change."""
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".h5", ".msgpack"})
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")

RegistryResolver = Callable[[str], tuple[Path, str]]
"""From `models:/NAME@ALIAS` or `models:/NAME/VERSION` to a local folder and `models:/NAME/VERSION`; see `tracking.registry`."""


class ResolvedCheckpoint(NamedTuple):
    """A model reference after resolution."""

    path: Path
    """Local folder with config.json and *.safetensors."""
    reference: str
    """What the user wrote."""
    pinned: str
    """What was found: `models:/NAME/VERSION`, `hf:ID@COMMIT` or `sha256:DIGEST` of the files."""


class ManifestEntry(StrictModel):
    """One file of a checkpoint."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the content."""
    bytes: int = Field(ge=0)
    """Size."""


class Manifest(StrictModel):
    """Where a checkpoint comes from, and what its files must be."""

    format: Literal[1] = 1
    """Version of this layout."""
    created: str
    """UTC time, ISO 8601."""
    parcelray_version: str
    """Version that wrote the checkpoint."""
    git_commit: str | None
    """Commit of the code that trained it; None outside a work tree."""
    seed: int | None
    """Seed of the training run."""
    data: Any
    """What it was trained on, as JSON."""
    config: Any
    """Resolved configuration of the run, as JSON."""
    extra: dict[str, Any]
    """Anything else worth keeping, such as scores."""
    files: dict[str, ManifestEntry]
    """By path relative to the folder, with '/'."""


def resolve_checkpoint(
    reference: str | Path,
    *,
    registry_resolver: RegistryResolver | None = None,
    verify: bool = True,
) -> ResolvedCheckpoint:
    """Finds the files that a model reference stands for. Call it once per job, and pass the result on.

    Args:
        reference: see the module's docstring. Of a folder and a Hub id of the same name the folder wins.
        registry_resolver: for `models:/...`, `functools.partial(tracking.registry.resolve_registry, tracking_uri=...)`.
        verify: compare every file with the manifest, where the folder has one (reads all weights).

    Returns:
        The folder and the pinned reference.

    Raises:
        UserError: if the reference cannot be resolved, or the files are not what the manifest says, or hold pickles.
    """
    text = str(reference)
    if text.startswith("models:/"):
        return _resolve_registry(text, registry_resolver, verify)
    if text in PACKAGED:
        folder = Path(parcelray.__file__).parent / "assets" / text
        if not folder.is_dir():
            raise UserError(
                f"this installation of parcelray ships no {text!r} checkpoint; give a folder, models:/NAME@ALIAS or a"
                " Hugging Face id."
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
    """`sha256:...` over the files of a checkpoint: the same wherever it was found."""
    return _check_folder(folder, verify=False)


def _resolve_registry(reference: str, resolver: RegistryResolver | None, verify: bool) -> ResolvedCheckpoint:
    if resolver is None:
        raise UserError(
            f"model reference {reference!r} needs a model registry; name a tracking URI, or give a folder or a Hugging"
            " Face id."
        )
    path, pinned = resolver(reference)
    _check_folder(path, verify)
    return ResolvedCheckpoint(path, reference, pinned)


def _check_folder(folder: Path, verify: bool) -> str:
    """Refuses what must not be loaded; returns the digest of the content as `sha256:...`."""
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
            f"{folder} has no *.safetensors file, and other formats of weights are never loaded; convert it with"
            " save_pretrained."
        )


def refuse_pickles(folder: Path) -> None:
    """Refuses a folder with files in formats that can run code when they are loaded, or that could be mistaken for weights.

    Raises:
        UserError: naming the first such file.
    """
    for name, path in _files(folder).items():
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise UserError(
                f"{folder} holds {name}, a format that can run code when it is loaded; remove it, and keep weights as"
                " *.safetensors."
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
    """Writes manifest.json over every file that is in the folder now, whole or not at all.

    Args:
        folder: a finished checkpoint.
        config: resolved configuration of the run; JSON-serialisable, as are `data` and `extra`.
        git_commit: commit of the code, None when unknown.
        data: what the model was trained on.
        seed: seed of the run.
        extra: anything else, such as scores.

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
    partial = folder / f".{MANIFEST_NAME}.tmp"
    partial.write_text(json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def read_manifest(folder: Path) -> Manifest:
    """Reads manifest.json without looking at the files it names.

    Raises:
        UserError: if it is missing or not a manifest.
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
    """Compares a folder with its manifest, sizes first.

    Raises:
        UserError: naming the file that is missing, unlisted, or different.
    """
    manifest = read_manifest(folder)
    remedy = "get the checkpoint again from where it came"
    present = _files(folder)
    for name, entry in manifest.files.items():
        if name not in present:
            raise UserError(f"{folder} lacks {name}, which its manifest lists; {remedy}.")
        size = present[name].stat().st_size
        if size != entry.bytes:
            raise UserError(f"{name} in {folder} has {size} bytes, but its manifest says {entry.bytes}; {remedy}.")
    for name, path in present.items():
        if name not in manifest.files:
            raise UserError(f"{folder} holds {name}, which its manifest does not list; remove it or {remedy}.")
        found = _sha256(path)
        if found != manifest.files[name].sha256:
            raise UserError(
                f"{name} in {folder} has SHA-256 {found}, but its manifest says {manifest.files[name].sha256};"
                f" {remedy}."
            )
    return manifest


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        name: path for path in paths if (name := path.relative_to(folder).as_posix()) not in (MANIFEST_NAME, _CARD_NAME)
    }


def _hash_files(folder: Path) -> dict[str, ManifestEntry]:
    return {
        name: ManifestEntry(sha256=_sha256(path), bytes=path.stat().st_size) for name, path in _files(folder).items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(repo: str, revision: str | None) -> tuple[Path, str]:
    """Fetches a Hub repository (without pickles) into the shared cache, once per node; returns its folder and commit."""
    from huggingface_hub import errors, snapshot_download

    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except errors.GatedRepoError as error:
        raise UserError(
            f"Hugging Face model {repo!r} is gated: accept its licence on its page, and set HF_TOKEN to a token of that"
            " account."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"Hugging Face model {repo!r} has no revision {revision!r}; name one of its commits, branches or tags."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{repo!r} is neither a folder here nor a Hugging Face model that can be seen; check the spelling, or set"
            " HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{repo!r} is not a folder here, and as a Hugging Face model it is not in the local cache and the Hub"
            f" cannot be reached (offline?); fetch it on a machine with network (`hf download {repo}`), or give a"
            " folder."
        ) from error
    except errors.HfHubHTTPError as error:
        raise UserError(
            f"the Hugging Face Hub refused {repo!r}: {error}; try again later, or give a folder."
        ) from error
    return path, path.name
