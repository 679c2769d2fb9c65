"""Models of the Hugging Face hub, in the hub's own cache on this host.

The cache belongs to all programs of the user. Only revisions that parcelray downloaded are limited in size: each has a
lock file in parcelray's cache, which a process that uses the revision keeps locked.
"""

from contextlib import nullcontext
from pathlib import Path

from parcelray.errors import UserError
from parcelray.models.host_cache import OnProgress, cache_root, hold, last_use, limit_bytes, unused, watched

FILE_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Suffixes of the files of a hub model; other files of its repository are neither downloaded nor loaded."""


def download(
    repo: str, revision: str | None, on_progress: OnProgress | None, *, weights: bool = True
) -> tuple[Path, str]:
    """Downloads a hub repository without pickles, unless the cache has it, and keeps it until this process ends.

    If the models that parcelray downloaded exceed the limit of the model cache, those that were not used for the
    longest time are deleted.

    Args:
        repo: `ORG/NAME`.
        revision: commit, branch or tag; None: the default branch.
        on_progress: receives the progress; None: nothing is reported.
        weights: whether the weights are needed, too.

    Returns:
        The folder and the commit.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    snapshots = _folder(repo) / "snapshots"
    before = {path.name for path in snapshots.iterdir()} if snapshots.is_dir() else set()
    while True:
        path = _snapshot(repo, revision, on_progress, weights=weights)
        lock = _lock_path(path.name)
        if path.name in before and not lock.exists():
            # Another program of the user has downloaded it.
            return path, path.name
        hold(lock)
        # Another process may have deleted it before it was locked.
        if path.is_dir():
            break
    _make_room()
    return path, path.name


def in_hub_cache(reference: str) -> bool:
    """Whether the hub's cache on this host has files of a hub model, given as `ORG/NAME` or `hf:ORG/NAME@REVISION`."""
    return _folder(reference.removeprefix("hf:").partition("@")[0]).is_dir()


def _folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _lock_path(commit: str) -> Path:
    return cache_root() / "hub" / f"{commit}.lock"


def _make_room() -> None:
    from huggingface_hub import constants, scan_cache_dir

    cache = scan_cache_dir(constants.HF_HUB_CACHE)
    revisions = [each for repo in cache.repos for each in repo.revisions if _lock_path(each.commit_hash).exists()]
    excess = sum(each.size_on_disk for each in revisions) - limit_bytes()
    for revision in sorted(revisions, key=lambda each: last_use(_lock_path(each.commit_hash))):
        if excess <= 0:
            return
        lock = _lock_path(revision.commit_hash)
        with unused(lock) as is_unused:
            if is_unused:
                cache.delete_revisions(revision.commit_hash).execute()
                lock.unlink()
                excess -= revision.size_on_disk


def _snapshot(repo: str, revision: str | None, on_progress: OnProgress | None, *, weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    patterns = [f"*{suffix}" for suffix in FILE_SUFFIXES if weights or suffix != ".safetensors"]
    try:
        with nullcontext() if on_progress is None else watched(_folder(repo), repo, on_progress):
            return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
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
