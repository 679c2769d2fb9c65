"""Checks of this machine: Python, installed versions, cores, memory, disks, ports and GPUs."""

import importlib.metadata
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from parcelray.cluster.session import temporary_folder
from parcelray.doctor.finding import Finding, guarded

_MIN_PYTHON = (3, 11)
_LOCKED = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+)")
_GIB = 2**30
_MEMORY_GIB = (2.0, 8.0)
"""Available memory below which the check fails, and below which it warns, GiB: Ray alone, and `make quickstart`."""
_DISK_GIB = (1.0, 10.0)
"""Free disk space below which the check fails, and below which it warns, GiB."""
_FULL = 0.95
"""Used fraction of a disk above which Ray writes no objects to it."""
_SHARED_FRACTION = 0.3
"""Fraction of the memory that Ray's object store takes as shared memory."""
_MAX_LISTED = 5


@guarded("Python", "install Python 3.11 or newer")
def check_python(version: Sequence[int] = sys.version_info[:3]) -> Finding:
    """Compares the version of Python with the oldest one that parcelray supports."""
    text, oldest = ".".join(map(str, version)), ".".join(map(str, _MIN_PYTHON))
    if tuple(version[:2]) < _MIN_PYTHON:
        return Finding("Python", "fail", f"Python {text} is older than {oldest}", f"install Python {oldest} or newer")
    return Finding("Python", "pass", text)


@guarded("versions", "run `pip install --requirement requirements.lock`")
def check_versions(lock: Path) -> Finding:
    """Compares the installed packages with requirements.lock.

    Args:
        lock: the file, with one line `name==version` for each package.
    """
    if not lock.is_file():
        return Finding("versions", "skip", f"there is no {lock.name} in this folder")
    locked = {match["name"]: match["version"] for match in map(_LOCKED.match, lock.read_text().splitlines()) if match}
    installed = {name: _installed(name) for name in locked}
    remedy = f"run `pip install --requirement {lock.name}`, or `make quickstart` for a new environment"
    if missing := [name for name, version in installed.items() if version is None]:
        return Finding("versions", "fail", f"not installed: {_listed(missing)}", remedy)
    # A build such as 2.13.0+cu130 is the same version for another GPU.
    other = [
        f"{name} {installed[name]} instead of {version}"
        for name, version in locked.items()
        if str(installed[name]).partition("+")[0] != version
    ]
    if other:
        return Finding("versions", "warn", _listed(other), remedy)
    return Finding("versions", "pass", f"all {len(locked)} packages of {lock.name}")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + more


@guarded("cores", "use a machine with 2 cores or more")
def check_cores() -> Finding:
    """Counts the cores that this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < 2:
        return Finding(
            "cores", "warn", "1 core: workers, data tasks and driver share it", "use a machine with 2 cores or more"
        )
    return Finding("cores", "pass", f"{count} cores")


def available_memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Returns the available and the total memory of this machine or container, bytes; None if it is not known.

    Args:
        root: folder that contains the folders `proc` and `sys` of Linux.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines if len(line.split()) > 1}
    available, total = kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    group = root / "sys/fs/cgroup"
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
    except (OSError, ValueError):
        # Without a limit the file does not exist, or contains `max`.
        return available, total
    return min(available, limit - used), min(total, limit)


@guarded("memory", "use a machine or container with Linux's tables in /proc")
def check_memory(root: Path = Path("/")) -> Finding:
    """Compares the available memory with what a local run of a mini model needs.

    Args:
        root: see `available_memory`.
    """
    memory = available_memory(root)
    if memory is None:
        return Finding("memory", "skip", "the available memory of this system cannot be read")
    free, total = (each / _GIB for each in memory)
    detail = f"{free:.1f} of {total:.1f} GiB are available"
    return _limited("memory", free, _MEMORY_GIB, detail, "stop other programs, or use a larger machine or container")


def _limited(check: str, amount: float, limits: tuple[float, float], detail: str, remedy: str) -> Finding:
    """Returns a finding of an amount of GiB with two lower limits: of failing and of warning."""
    for status, limit in (("fail", limits[0]), ("warn", limits[1])):
        if amount < limit:
            return Finding(check, status, f"{detail}, less than {limit:g} GiB", remedy)  # type: ignore[arg-type]
    return Finding(check, "pass", detail)


@guarded("shared memory", "mount /dev/shm with mode 1777")
def check_shared_memory(folder: Path = Path("/dev/shm"), root: Path = Path("/")) -> Finding:
    """Compares the free shared memory with the default size of Ray's object store.

    Args:
        folder: the file system of shared memory.
        root: see `available_memory`.
    """
    memory = available_memory(root)
    if not folder.is_dir() or memory is None:
        return Finding("shared memory", "skip", f"there is no {folder} on this system")
    if not os.access(folder, os.W_OK):
        return Finding("shared memory", "fail", f"{folder} cannot be written to", f"mount {folder} with mode 1777")
    free, needed = shutil.disk_usage(folder).free / _GIB, _SHARED_FRACTION * memory[0] / _GIB
    detail = f"{free:.1f} GiB are free in {folder}"
    if free < needed:
        return Finding(
            "shared memory",
            "warn",
            f"{detail}, less than {needed:.1f} GiB of Ray's object store, which uses the disk instead",
            "start the container with --shm-size of at least 30 % of its memory",
        )
    return Finding("shared memory", "pass", detail)


@guarded("disk", "set RAY_TMPDIR and `storage` to folders that can be written to")
def check_disk(storage: str) -> Finding:
    """Checks the free space for Ray's files and, if the storage of runs is local, for runs.

    Args:
        storage: folder or URI.
    """
    folders = [temporary_folder(), *([nearest_folder(Path(storage))] if "://" not in storage else [])]
    worst = min(folders, key=lambda folder: shutil.disk_usage(folder).free)
    usage = shutil.disk_usage(worst)
    detail = f"{usage.free / _GIB:.1f} GiB are free in {worst}"
    remedy = f"free some space, or use other folders (RAY_TMPDIR for Ray's files, `storage` for runs); now: {worst}"
    if usage.free >= _DISK_GIB[1] * _GIB and usage.used > _FULL * usage.total:
        return Finding("disk", "warn", f"{detail}, but it is {100 * usage.used / usage.total:.0f} % full", remedy)
    return _limited("disk", usage.free / _GIB, _DISK_GIB, detail, remedy)


def nearest_folder(path: Path) -> Path:
    """Returns a folder, or the nearest existing folder above it."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


@guarded("ports", "switch on the loopback interface (`ip link set lo up`)")
def check_ports(ports: Mapping[int, str]) -> Finding:
    """Checks that this machine can listen on the loopback address, and which ports are in use.

    Args:
        ports: port -> what listens on it by default.
    """
    with socket.create_server(("127.0.0.1", 0)):
        pass
    used = [f"{port} ({user})" for port, user in ports.items() if not _is_free(port)]
    if used:
        return Finding(
            "ports",
            "warn",
            f"in use: {', '.join(used)}",
            "end the program that listens there, or choose another port (http.port of a serve job, PORT of `make ui`)",
        )
    return Finding("ports", "pass", f"{', '.join(map(str, ports))} are free")


def _is_free(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


@guarded("GPU", "restart the machine's GPU driver, or set CUDA_VISIBLE_DEVICES to the GPUs that work")
def check_gpu(requested: bool, driver: Path = Path("/proc/driver/nvidia/version")) -> Finding:
    """Multiplies two small matrices on each GPU.

    Args:
        requested: whether the job needs GPUs on this machine.
        driver: a file that exists if the driver of NVIDIA GPUs is loaded.
    """
    import torch

    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            matrix = torch.ones(64, 64, device=f"cuda:{index}")
            assert float((matrix @ matrix).sum()) == 64.0**3, f"cuda:{index} computes wrong numbers"
            free, _ = torch.cuda.mem_get_info(index)
            names.append(f"{torch.cuda.get_device_name(index)} ({free / _GIB:.1f} GiB free)")
        return Finding("GPU", "pass", ", ".join(names))
    if driver.exists():
        return Finding(
            "GPU",
            "fail" if requested else "warn",
            f"this machine has the driver of a GPU, but torch {torch.__version__} cannot use it",
            "install the CUDA build of torch that fits the driver, and check CUDA_VISIBLE_DEVICES",
        )
    if requested:
        return Finding("GPU", "fail", "the job requests GPUs, but this machine has none", "submit the job to a cluster")
    return Finding("GPU", "skip", "this machine has no GPU")
