"""Resolves model references once to files that are pinned, verified and free of pickle.

A reference is a local folder, the name of a checkpoint in the package (`PACKAGED`), `models:/NAME@ALIAS`,
`models:/NAME/VERSION`, a Hugging Face id `ORG/NAME` or `ORG/NAME@REVISION`, or the URI of a folder on object storage,
such as `s3://bucket/runs/train/NAME/model`. The driver resolves it once and sends a `ModelPin` to the other processes,
which open it on their hosts. Reports and serving use the pinned form, never the alias or branch.
"""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import fsspec

import parcelray
from parcelray.config.base import StrictModel
from parcelray.config.paths import PACKAGED
from parcelray.errors import UserError
from parcelray.files import is_local, open_storage
from parcelray.models import hub
from parcelray.models.host_cache import (
    OnProgress,
    cache_root,
    cached_model,
    downloaded_model,
    host_lock,
    remembered_digest,
)
from parcelray.models.manifest import (
    MANIFEST_NAME,
    checkpoint_files,
    files_digest,
    hash_files,
    parse_manifest,
    require_safetensors,
    verified_digest,
)

MINI_BASE = "mini_base"
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*")

RegistryResolver = Callable[[str], tuple[Path, str]]
"""Maps `models:/NAME@ALIAS` or `models:/NAME/VERSION` to a local folder and `models:/NAME/VERSION`.

See `tracking.registry`.
"""
FileReader = Callable[[str], bytes]
"""Returns the content of a file of a stored model by its path in the model's folder."""


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
    parts = _HUB_ID.fullmatch(text.removeprefix("hf:"))
    if parts is None or text.startswith((".", "~", "/")):
        raise UserError(
            f"model reference {text!r} is neither an existing folder nor {', '.join(PACKAGED)}, models:/NAME@ALIAS,"
            " models:/NAME/VERSION, a URI of object storage or a Hugging Face id ORG/NAME[@REVISION]; check the path."
        )
    path, commit = hub.download(parts["repo"], parts["revision"], on_progress)
    return ResolvedCheckpoint(path, text, ModelPin(reference=f"hf:{parts['repo']}@{commit}", digest=_hub_digest(path)))


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
    if pin.registry_folder is not None and Path(pin.registry_folder).is_dir():
        folder = Path(pin.registry_folder)
        if verified_digest(folder) == pin.digest:
            return folder
    if pin.is_path and not Path(pin.reference).is_dir():
        raise UserError(
            f"the model folder {pin.reference} does not exist on the host {os.uname().nodename}; copy it to the same"
            " path on every host, or use models:/NAME/VERSION, a Hugging Face id or a URI of object storage."
        )
    # The hub limits the number of requests: one process downloads, and the others find a commit without a request.
    is_hub = pin.reference.startswith("hf:")
    with host_lock(f"hub-{pin.digest.removeprefix('sha256:')}") if is_hub else nullcontext():
        opened = resolve_checkpoint(pin.reference, registry_resolver=registry_resolver, on_progress=on_progress)
    _check_digest(pin, opened.pin.digest)
    return opened.path


def open_settings(
    pin: ModelPin,
    *,
    registry_reader: FileReader | None = None,
    registry_resolver: RegistryResolver | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Returns a folder of this host with the configuration, tokenizer and image processor of a pinned model.

    The weights are there only if the host has the whole model; they are not downloaded.

    Args:
        pin: the model, from `resolve_checkpoint` in the driver.
        registry_reader: reads files of a registered version that this host has to download.
        registry_resolver: see `resolve_checkpoint`.
        on_progress: see `resolve_checkpoint`.

    Raises:
        UserError: see `open_pin`.
    """
    if (cached := cached_model(pin.digest, verified_digest)) is not None:
        return cached
    if pin.reference.startswith("hf:"):
        repo, commit = pin.reference.removeprefix("hf:").split("@")
        return hub.download(repo, commit, on_progress, weights=False)[0]
    read = registry_reader
    if _URI.fullmatch(pin.reference):
        filesystem, root = open_storage(pin.reference)
        read = None if is_local(filesystem) else lambda name: bytes(filesystem.cat_file(f"{root}/{name}"))
    if read is None:
        return open_pin(pin, registry_resolver=registry_resolver, on_progress=on_progress)
    name = pin.digest.replace(":", "-")
    folder = cache_root() / "settings" / name
    with host_lock(f"settings-{name}"):
        if not folder.is_dir():
            _download_settings(pin, read, folder)
    return folder


def _download_settings(pin: ModelPin, read: FileReader, folder: Path) -> None:
    """Downloads the files of a model except its weights, and compares them with the manifest and the pinned digest."""
    content = read(MANIFEST_NAME)
    files = parse_manifest(content, pin.reference).files
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / MANIFEST_NAME).write_bytes(content)
    for name, entry in files.items():
        if name.endswith(".safetensors"):
            continue
        target = _inside(partial, name, pin.reference)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read(name))
        if hash_files({name: target})[name] != entry:
            raise UserError(f"{name} of {pin.reference} differs from its manifest; store or register the model again.")
    _check_digest(pin, files_digest(files))
    partial.rename(folder)


def _check_digest(pin: ModelPin, found: str) -> None:
    if found != pin.digest:
        raise UserError(
            f"the model {pin.reference} has the digest {found} on the host {os.uname().nodename}, but the driver"
            f" resolved {pin.digest}; give every host the same files, or install the same version of parcelray there."
        )


def _inside(folder: Path, name: str, reference: str) -> Path:
    """Returns the path of a file that a manifest lists; refuses one outside of the folder."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"the manifest of {reference} lists {name}, which is outside the model's folder; remove it.")
    return folder / name


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
    manifest = parse_manifest(content, uri)

    def download(folder: Path) -> Path:
        (folder / MANIFEST_NAME).write_bytes(content)
        for name in manifest.files:
            target = _inside(folder, name, uri)
            target.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(f"{root}/{name}", str(target))
        return folder

    digest = files_digest(manifest.files)
    size = sum(entry.bytes for entry in manifest.files.values())
    path = downloaded_model(digest, download, verified_digest, name=uri, num_bytes=size, on_progress=on_progress)
    return ResolvedCheckpoint(path, uri, ModelPin(reference=uri, digest=digest))


def _hub_digest(folder: Path) -> str:
    """Returns the content digest of a hub model, whose folder may have other files of the repository."""
    require_safetensors(folder)
    files = {name: path for name, path in checkpoint_files(folder).items() if path.suffix in hub.FILE_SUFFIXES}
    return remembered_digest(folder, lambda: files_digest(hash_files(files)))
