"""Resolves model references once to files that are pinned, verified and free of pickle.

A reference is a local folder, the name of a checkpoint in the package (`PACKAGED`), `models:/NAME@ALIAS`,
`models:/NAME/VERSION`, a Hugging Face id `ORG/NAME` or `ORG/NAME@REVISION`, or the URI of a folder on object storage,
such as `s3://bucket/runs/train/NAME/model`. The driver resolves it once and sends a `ModelPin` to the other processes,
which open it on their hosts. Reports and serving use the pinned form, never the alias or branch.
"""

import os
import re
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
from parcelray.models.host_cache import (
    OnProgress,
    cached_model,
    downloaded_model,
    host_lock,
    remembered_digest,
    watched,
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


def _hub_digest(folder: Path) -> str:
    """Returns the content digest of a hub model, whose folder may have other files of the repository."""
    require_safetensors(folder)
    files = {name: path for name, path in checkpoint_files(folder).items() if path.suffix in _HUB_SUFFIXES}
    return remembered_digest(folder, lambda: files_digest(hash_files(files)))


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
