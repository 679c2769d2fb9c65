"""The cache of models on a host: one folder per content digest, filled once, verified, and limited in size.

An entry is the folder `sha256-DIGEST` with the files of one model. A lock file next to it serialises the processes of a
host: one of them downloads, the others wait for it. A process keeps a shared lock on each entry that it uses, so that
no other process removes it. When a new entry needs room, the entries that were not used for the longest time go first.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parcelray.errors import SystemFailure, UserError
from parcelray.files import write_json

LIMIT_VARIABLE = "PARCELRAY_MODEL_CACHE_GB"
"""Environment variable with the size limit of the cache, GB; it belongs to the host, so it is no key of a job."""
_DEFAULT_LIMIT_GB = 100.0
_POLL_S = 0.5
"""Interval at which the progress of a download and the lock of another process are checked, seconds."""
_REPORT_S = 5.0
"""Interval of the progress, seconds; a faster download reports nothing."""
_SETTLED_NS = 1_000_000_000
"""Age from which a file's time stamp is trusted; a younger file could change again without a new time stamp."""
_GB = 1e9

DOWNLOADING = "downloading"
"""First word of the progress of a download."""

OnProgress = Callable[[str], None]
"""Called with a sentence on the state of a download, every few seconds."""
Download = Callable[[Path], Path]
"""Writes files below an empty folder, and returns the folder that directly contains the files of the model."""

_held: dict[Path, int] = {}
"""File descriptors of the locked files of the entries that this process uses; they are open until the process ends."""


def cache_root() -> Path:
    """Returns the folder of the cache: `parcelray/models` in XDG_CACHE_HOME, which is `~/.cache` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "parcelray" / "models"


def cached_model(digest: str, digest_of: Callable[[Path], str]) -> Path | None:
    """Returns the folder of an intact entry, and keeps it from removal until this process ends; None without one.

    Args:
        digest: content digest of the model, `sha256:DIGEST`.
        digest_of: computes the digest of a folder and verifies it.
    """
    entry = _entry(digest)
    if not entry.is_dir():
        return None
    with _lock(_lock_path(entry), fcntl.LOCK_SH) as lock:
        return _hold(entry, lock) if _is_intact(entry, digest, digest_of) else None


def downloaded_model(
    digest: str,
    download: Download,
    digest_of: Callable[[Path], str],
    *,
    name: str,
    num_bytes: int,
    on_progress: OnProgress | None = None,
) -> Path:
    """Returns the folder of an entry, which is downloaded if the cache does not have it or it is damaged.

    Args:
        digest: content digest of the model, `sha256:DIGEST`.
        download: downloads the files.
        digest_of: computes the digest of a folder and verifies it.
        name: the model's reference, for messages.
        num_bytes: size of the files, bytes.
        on_progress: receives the progress; None: a line on standard error every few seconds.

    Raises:
        UserError: the downloaded files have another digest, or are larger than the limit of the cache.
        SystemFailure: the disk is full.
    """
    entry = _entry(digest)
    report = on_progress or _write_line
    partial = entry.with_suffix(".partial")
    throttled = _throttled(report)

    def waiting() -> None:
        throttled(_state(name, partial, num_bytes))

    while True:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _lock(_lock_path(entry), fcntl.LOCK_EX, waiting) as lock:
            if not (entry.is_dir() and _is_intact(entry, digest, digest_of)):
                shutil.rmtree(entry, ignore_errors=True)
                shutil.rmtree(partial, ignore_errors=True)
                _make_room(entry, num_bytes, name)
                try:
                    with watched(partial, name, report, num_bytes):
                        partial.mkdir()
                        download(partial).rename(entry)
                    _verify(entry, digest, digest_of, name)
                except BaseException:
                    shutil.rmtree(entry, ignore_errors=True)
                    raise
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            # The change from an exclusive to a shared lock is not atomic, so the entry may be removed in between.
            fcntl.flock(lock, fcntl.LOCK_SH)
            if entry.is_dir():
                return _hold(entry, lock)


def remembered_digest(folder: Path, compute: Callable[[], str]) -> str:
    """Returns the digest of a folder, and computes it only if a file has changed since the last time on this host.

    Args:
        folder: the folder.
        compute: computes the digest from all bytes.
    """
    record = cache_root() / "digests" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
    before = _file_times(folder)
    with suppress(OSError, ValueError, KeyError):
        stored = json.loads(record.read_bytes())
        if stored["files"] == before:
            return str(stored["digest"])
    digest = compute()
    newest = max((times[-1] for times in before.values()), default=0)
    if before == _file_times(folder) and time.time_ns() - newest > _SETTLED_NS:
        # A read-only home folder only makes the next call slower.
        with suppress(OSError):
            write_json(record, {"folder": str(folder), "digest": digest, "files": before})
    return digest


@contextmanager
def host_lock(name: str) -> Iterator[None]:
    """Holds a lock of this host for the block, such as for a download into another cache."""
    path = cache_root() / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path, fcntl.LOCK_EX):
        yield


def _entry(digest: str) -> Path:
    return cache_root() / digest.replace(":", "-")


def _lock_path(entry: Path) -> Path:
    return entry.with_suffix(".lock")


@contextmanager
def _lock(path: Path, mode: int, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Locks a file for the block and yields its descriptor; `_hold` keeps the lock after the block."""
    # This process would wait forever for a lock that it holds itself.
    if (own := _held.pop(path, None)) is not None:
        os.close(own)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            try:
                fcntl.flock(file, mode | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(_POLL_S)
        yield file
    finally:
        if _held.get(path) != file:
            os.close(file)


def hold(lock_path: Path) -> None:
    """Keeps an entry with this lock file from removal until this process ends."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(lock_path, fcntl.LOCK_SH) as lock:
        _keep(lock_path, lock)


@contextmanager
def unused(lock_path: Path) -> Iterator[bool]:
    """Yields whether no process uses the entry with this lock file; for the block, none can begin to."""
    with lock_path.open("a") as file:
        is_unused = lock_path not in _held
        if is_unused:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_unused = False
        yield is_unused


def last_use(lock_path: Path) -> float:
    """Returns when the entry with this lock file was last used, seconds since 1970; 0 if that is unknown."""
    with suppress(OSError):
        return lock_path.stat().st_mtime
    return 0.0


def _hold(entry: Path, lock: int) -> Path:
    _keep(_lock_path(entry), lock)
    return entry


def _keep(lock_path: Path, lock: int) -> None:
    # The time of the last use decides which entries are removed first.
    os.utime(lock_path)
    _held[lock_path] = lock


def _is_intact(entry: Path, digest: str, digest_of: Callable[[Path], str]) -> bool:
    try:
        return digest_of(entry) == digest
    except UserError:
        return False


def _verify(entry: Path, digest: str, digest_of: Callable[[Path], str], name: str) -> None:
    found = digest_of(entry)
    if found != digest:
        raise UserError(
            f"The files of {name} have the digest {found}, but {digest} was expected; they changed after the model was"
            " stored, so store or register it again."
        )


def _make_room(entry: Path, num_bytes: int, name: str) -> None:
    limit = limit_bytes()
    if num_bytes > limit:
        raise UserError(
            f"{name} has {num_bytes / _GB:.1f} GB, but the model cache of {os.uname().nodename} is limited to"
            f" {limit / _GB:.1f} GB; set {LIMIT_VARIABLE} to a larger number there."
        )
    root = entry.parent
    sizes = {path: _num_bytes(path) for path in root.glob("sha256-*") if path.is_dir()}
    excess = sum(sizes.values()) + num_bytes - limit
    lacking = num_bytes - shutil.disk_usage(root).free
    for path in sorted(sizes, key=lambda each: last_use(_lock_path(each))):
        if max(excess, lacking) <= 0:
            break
        if path != entry and _removed(path):
            excess, lacking = excess - sizes[path], lacking - sizes[path]
    if lacking > 0:
        raise SystemFailure(
            f"{name} needs {num_bytes / _GB:.1f} GB, but the disk of {root} on {os.uname().nodename} has"
            f" {shutil.disk_usage(root).free / _GB:.1f} GB free; free some space, or set XDG_CACHE_HOME to another"
            " disk."
        )


def limit_bytes() -> float:
    """Returns the limit of each cache of models on this host, bytes.

    Raises:
        UserError: the environment variable is not a positive number.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_LIMIT_GB)
    with suppress(ValueError):
        if (limit := float(text)) > 0:
            return limit * _GB
    raise UserError(f"{LIMIT_VARIABLE} is {text!r}; set it to the size of the model cache in GB, such as 50.")


def _removed(path: Path) -> bool:
    """Removes an entry, or what an interrupted download left; False if a process uses it."""
    with unused(_lock_path(path)) as is_unused:
        if is_unused:
            shutil.rmtree(path, ignore_errors=True)
    return is_unused and not path.exists()


def _num_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # A download renames its files while it runs.
        with suppress(OSError):
            total += path.lstat().st_size
    return total


def _file_times(folder: Path) -> dict[str, list[int]]:
    """Returns size, time of the last modification and of the last change (ns) of each file, by relative path."""
    files = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in files
    }


@contextmanager
def watched(folder: Path, name: str, on_progress: OnProgress, num_bytes: int | None = None) -> Iterator[None]:
    """Reports the size of a growing folder for the block, because the libraries that download report nothing.

    Args:
        folder: the folder, which need not exist yet.
        name: the model's reference.
        on_progress: receives the progress.
        num_bytes: size of the complete folder, bytes; None: it is unknown.
    """
    report = _throttled(on_progress)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_S):
            report(_state(name, folder, num_bytes))

    thread = threading.Thread(target=watch, name="parcelray-download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _state(name: str, folder: Path, num_bytes: int | None) -> str:
    total = f" of {num_bytes / _GB:.2f}" if num_bytes is not None else ""
    return f"{DOWNLOADING} {name} to {os.uname().nodename}: {_num_bytes(folder) / _GB:.2f}{total} GB"


def _write_line(state: str) -> None:
    sys.stderr.write(f"{state}\n")


def _throttled(report: OnProgress) -> OnProgress:
    last = time.monotonic()

    def write(state: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_S:
            last = time.monotonic()
            report(state)

    return write
