"""Resolves model references once to files that are pinned, verified and free of pickle.

A reference is a local folder, the name of a checkpoint in the package (`PACKAGED`), `models:/NAME@ALIAS`,
`models:/NAME/VERSION`, a Hugging Face id `ORG/NAME` or `ORG/NAME@REVISION`, or the URI of a folder on object storage,
such as `s3://bucket/runs/train/NAME/model`. The driver resolves it once and sends a `ModelPin` to the other processes,
which open it on their hosts. Reports and serving use the pinned form, never the alias or branch.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import fsspec
from pydantic import Field, ValidationError

import parcelray
from parcelray.config.base import StrictModel
from parcelray.config.paths import PACKAGED
from parcelray.errors import UserError
from parcelray.files import INDEX, atomic_write, is_local, open_storage
from parcelray.models.host_cache import (
    OnProgress,
    cached_model,
    downloaded_model,
    host_lock,
    remembered_digest,
    watched,
)

MANIFEST_NAME = "manifest.json"
MINI_BASE = "mini_base"
_CARD_NAME = "README.md"
"""The model card, which is written after the weights and may change, so the manifest does not cover it."""
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".h5", ".msgpack"})
_HUB_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Suffixes of the files of a hub model; other files of its repository are neither downloaded nor loaded."""
_HUB_PATTERNS = [f"*{suffix}" for suffix in _HUB_SUFFIXES]
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*")

RegistryResolver = Callable[[str], tuple[Path, str]]
"""Maps `models:/NAME@ALIAS` or `models:/NAME/VERSION` to a local folder and `models:/NAME/VERSION`.

See `tracking.registry`.
"""


class ModelPin(StrictModel):
    """A reference to one content of a model, which any host can open (`tracking.opening.model_folder`)."""

    reference: str
    """`models:/NAME/VERSION`, `hf:ORG/NAME@COMMIT`, a URI, a packaged name, or the absolute path of a folder."""
    digest: str
    """`sha256:DIGEST` of the files, see `content_digest`."""
    tracking_uri: str | None = None
    """Tracking URI of the registry of a `models:/` reference; null: the reference needs no registry."""
    registry_folder: str | None = None
    """Folder of a registered version on the driver's disk; a host that sees the same content there uses it."""

    @property
    def name(self) -> str:
        """Reference that never gets another content: a version, a commit on the hub, or else the digest."""
        return self.reference if self.reference.startswith(("models:/", "hf:")) else self.digest

    @property
    def is_path(self) -> bool:
        """Whether each host must have the files under this path already."""
        return self.reference.startswith("/")


class ResolvedCheckpoint(NamedTuple):
    """A model reference, and the files that it was resolved to."""

    path: Path
    """Local folder with config.json and *.safetensors."""
    reference: str
    """The reference as the user wrote it."""
    pin: ModelPin
    """What is sent to other hosts."""

    @property
    def pinned(self) -> str:
        """The pinned reference: `models:/NAME/VERSION`, `hf:ID@COMMIT` or `sha256:DIGEST` of the files."""
        return self.pin.name


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
    on_progress: OnProgress | None = None,
) -> ResolvedCheckpoint:
    """Resolves a model reference to local files; called once per job, by the driver.

    Files that differ from their manifest are refused. All bytes are read again only if a file changed since the last
    time on this host.

    Args:
        reference: see the module's docstring. If both a folder and a Hugging Face id match, the folder is used.
        registry_resolver: resolver for `models:/...`, that is,
            `functools.partial(tracking.registry.resolve_registry, tracking_uri=...)`.
        on_progress: receives the progress of a download; None: lines on standard error.

    Returns:
        The folder and the pin.

    Raises:
        UserError: the reference cannot be resolved, the files differ from the manifest, or they include pickles.
    """
    text = str(reference)
    if text.startswith("models:/"):
        return _resolve_registry(text, registry_resolver)
    if text in PACKAGED:
        folder = Path(parcelray.__file__).parent / "assets" / text
        if not folder.is_dir():
            raise UserError(
                f"this installation of parcelray does not contain the checkpoint {text!r}; give a folder,"
                " models:/NAME@ALIAS or a Hugging Face id."
            )
        return ResolvedCheckpoint(folder, text, ModelPin(reference=text, digest=verified_digest(folder)))
    if _URI.fullmatch(text):
        filesystem, root = open_storage(text)
        if not is_local(filesystem):
            return _resolve_uri(text, filesystem, root, on_progress)
        text = root
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        folder = folder.resolve()
        return ResolvedCheckpoint(
            folder, str(reference), ModelPin(reference=str(folder), digest=verified_digest(folder))
        )
    hub = _HUB_ID.fullmatch(text.removeprefix("hf:"))
    if hub is None or text.startswith((".", "~", "/")):
        raise UserError(
            f"model reference {text!r} is neither an existing folder nor {', '.join(PACKAGED)}, models:/NAME@ALIAS,"
            " models:/NAME/VERSION, a URI of object storage or a Hugging Face id ORG/NAME[@REVISION]; check the path."
        )
    path, commit = _download(hub["repo"], hub["revision"], on_progress)
    return ResolvedCheckpoint(path, text, ModelPin(reference=f"hf:{hub['repo']}@{commit}", digest=_hub_digest(path)))


def open_pin(
    pin: ModelPin,
    *,
    registry_resolver: RegistryResolver | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Returns the folder of a pinned model on this host; a process downloads it, if needed, and the others wait.

    Args:
        pin: the model, from `resolve_checkpoint` in the driver.
        registry_resolver: see `resolve_checkpoint`; `tracking.opening.model_folder` sets it.
        on_progress: see `resolve_checkpoint`.

    Raises:
        UserError: the files cannot be had on this host, or they are not those that the driver resolved.
        SystemFailure: the disk of this host is full.
    """
    if (cached := cached_model(pin.digest, verified_digest)) is not None:
        return cached
    host = os.uname().nodename
    if pin.registry_folder is not None and Path(pin.registry_folder).is_dir():
        folder = Path(pin.registry_folder)
        if verified_digest(folder) == pin.digest:
            return folder
    if pin.is_path and not Path(pin.reference).is_dir():
        raise UserError(
            f"the model folder {pin.reference} does not exist on the host {host}; copy it to the same path on every"
            " host, or use models:/NAME/VERSION, a Hugging Face id or a URI of object storage."
        )
    # The hub limits the number of requests: one process downloads, and the others find a commit without a request.
    is_hub = pin.reference.startswith("hf:")
    with host_lock(f"hub-{pin.digest.removeprefix('sha256:')}") if is_hub else nullcontext():
        opened = resolve_checkpoint(pin.reference, registry_resolver=registry_resolver, on_progress=on_progress)
    if opened.pin.digest != pin.digest:
        raise UserError(
            f"the model {pin.reference} has the digest {opened.pin.digest} on the host {host}, but the driver resolved"
            f" {pin.digest}; give every host the same files, or install the same version of parcelray there."
        )
    return opened.path


def content_digest(folder: Path) -> str:
    """Returns `sha256:DIGEST` over the files of a checkpoint; it does not depend on the location of the folder.

    If the folder has a manifest, its checksums are used, and the files are not read.
    """
    _refuse_unusable(folder)
    has_manifest = (folder / MANIFEST_NAME).is_file()
    return files_digest(read_manifest(folder).files if has_manifest else _hash_files(_files(folder)))


def verified_digest(folder: Path) -> str:
    """Returns the same as `content_digest`, after a comparison of all files with the manifest, if there is one.

    Raises:
        UserError: the folder has pickles or no safetensors, or a file differs from the manifest.
    """
    _refuse_unusable(folder)

    def compute() -> str:
        has_manifest = (folder / MANIFEST_NAME).is_file()
        return files_digest(verify_manifest(folder).files if has_manifest else _hash_files(_files(folder)))

    return remembered_digest(folder, compute)


def _resolve_registry(reference: str, resolver: RegistryResolver | None) -> ResolvedCheckpoint:
    if resolver is None:
        raise UserError(
            f"model reference {reference!r} needs a model registry; set a tracking URI, or give a folder or a Hugging"
            " Face id."
        )
    path, pinned = resolver(reference)
    return ResolvedCheckpoint(path, reference, ModelPin(reference=pinned, digest=verified_digest(path)))


def _resolve_uri(
    uri: str, filesystem: fsspec.AbstractFileSystem, root: str, on_progress: OnProgress | None
) -> ResolvedCheckpoint:
    """Downloads a model from object storage into the host's cache, unless it is there.

    Only the files that its manifest lists are read, because a listing of some stores lacks new files.
    """
    try:
        content = filesystem.cat_file(f"{root}/{MANIFEST_NAME}")
    except FileNotFoundError as error:
        raise UserError(
            f"{uri} has no {MANIFEST_NAME}, so it is not a model that parcelray stored; check the URI."
        ) from error
    manifest = _parsed_manifest(content, uri)

    def download(folder: Path) -> Path:
        (folder / MANIFEST_NAME).write_bytes(content)
        for name in manifest.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"the manifest of {uri} lists {name}, which is outside the model's folder; remove it.")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(f"{root}/{name}", str(target))
        return folder

    digest = files_digest(manifest.files)
    size = sum(entry.bytes for entry in manifest.files.values())
    path = downloaded_model(digest, download, verified_digest, name=uri, num_bytes=size, on_progress=on_progress)
    return ResolvedCheckpoint(path, uri, ModelPin(reference=uri, digest=digest))


def _refuse_unusable(folder: Path) -> None:
    refuse_pickles(folder)
    _require_safetensors(folder)


def files_digest(files: Mapping[str, ManifestEntry]) -> str:
    """Returns the content digest of a checkpoint with these files."""
    lines = "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(files.items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


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
        files=_hash_files(_files(folder)),
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
        return _parsed_manifest((folder / MANIFEST_NAME).read_bytes(), str(folder))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {MANIFEST_NAME}; write one with write_manifest, or train and export the checkpoint again."
        ) from error


def _parsed_manifest(content: bytes, folder: str) -> Manifest:
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


def _hash_files(files: Mapping[str, Path]) -> dict[str, ManifestEntry]:
    return {name: ManifestEntry(sha256=_sha256(path), bytes=path.stat().st_size) for name, path in files.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub_digest(folder: Path) -> str:
    """Returns the content digest of a hub model, whose folder may have other files of the repository."""
    _require_safetensors(folder)
    files = {name: path for name, path in _files(folder).items() if path.suffix in _HUB_SUFFIXES}
    return remembered_digest(folder, lambda: files_digest(_hash_files(files)))


def in_hub_cache(reference: str) -> bool:
    """Whether the hub's cache on this host has files of a hub model, given as `ORG/NAME` or `hf:ORG/NAME@REVISION`."""
    return _hub_cache(reference.removeprefix("hf:").partition("@")[0]).is_dir()


def _hub_cache(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _download(repo: str, revision: str | None, on_progress: OnProgress | None) -> tuple[Path, str]:
    """Downloads a Hub repository without pickles into the hub's cache on this host; returns its folder and commit."""
    from huggingface_hub import errors, snapshot_download

    cached = _hub_cache(repo)
    try:
        with nullcontext() if on_progress is None else watched(cached, repo, on_progress):
            path = Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_PATTERNS))
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
