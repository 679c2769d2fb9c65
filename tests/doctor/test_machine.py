"""Checks of the machine: each failure and warning is provoked, and each has a remedy."""

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from parcelray.doctor import machine
from parcelray.doctor.finding import Finding, guarded
from parcelray.errors import SystemFailure

GIB = 2**30


def _is(finding: Finding, status: str, *words: str) -> None:
    assert finding.status == status, finding
    assert bool(finding.remedy) == (status in ("warn", "fail")), finding
    missing = [word for word in words if word not in f"{finding.detail} {finding.remedy}"]
    assert missing == [], finding


def test_an_old_python_fails() -> None:
    _is(machine.check_python(), "pass", "3.")
    _is(machine.check_python((3, 10, 9)), "fail", "3.10.9", "install Python 3.11")


@pytest.mark.parametrize(
    ("lines", "status", "words"),
    [
        (["# a comment", "pyyaml=={}"], "pass", ["all 1 packages"]),
        (["pyyaml==1.0"], "warn", ["instead of 1.0", "pip install"]),
        (["pyyaml=={}", "no-such-package==1.0"], "fail", ["not installed: no-such-package", "pip install"]),
        ([f"no-such-package-{index}==1.0" for index in range(7)], "fail", ["and 2 more"]),
    ],
)
def test_installed_packages_are_compared_with_the_lock(
    tmp_path: Path, lines: list[str], status: str, words: list[str]
) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("\n".join(lines).format(machine._installed("pyyaml")))
    _is(machine.check_versions(lock), status, *words)


def test_without_a_lock_the_versions_are_skipped(tmp_path: Path) -> None:
    _is(machine.check_versions(tmp_path / "requirements.lock"), "skip")


def test_one_core_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    _is(machine.check_cores(), "pass", "2 cores")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    _is(machine.check_cores(), "warn", "1 core")


def _memory(root: Path, available_gib: float, limit: str | None = None, used: int = 0) -> Path:
    (root / "proc").mkdir(parents=True)
    kib = int(available_gib * 2**20)
    (root / "proc/meminfo").write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable: {kib} kB\nHugePages_Total: 0\n")
    if limit is not None:
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/memory.max").write_text(limit)
        (root / "sys/fs/cgroup/memory.current").write_text(str(used))
    return root


@pytest.mark.parametrize(
    ("memory", "status", "words"),
    [
        ({"available_gib": 8.0}, "pass", ["8.0 of 64.0 GiB"]),
        ({"available_gib": 8.0, "limit": "max"}, "pass", ["8.0 of 64.0 GiB"]),
        ({"available_gib": 3.0}, "warn", ["3.0 of 64.0 GiB", "less than 8 GiB"]),
        ({"available_gib": 1.0}, "fail", ["less than 2 GiB", "stop other programs"]),
        # A container of 4 GiB, of which three are in use.
        ({"available_gib": 8.0, "limit": str(4 * GIB), "used": 3 * GIB}, "fail", ["1.0 of 4.0 GiB"]),
    ],
)
def test_little_memory_is_reported(tmp_path: Path, memory: dict[str, Any], status: str, words: list[str]) -> None:
    _is(machine.check_memory(_memory(tmp_path, **memory)), status, *words)


def test_memory_that_cannot_be_read_is_skipped(tmp_path: Path) -> None:
    _is(machine.check_memory(tmp_path), "skip")
    _is(machine.check_shared_memory(tmp_path / "shm", tmp_path), "skip")


def test_little_shared_memory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _memory(tmp_path / "root", 10.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(8 * GIB, 0, 8 * GIB))
    _is(machine.check_shared_memory(tmp_path, root), "pass", "8.0 GiB")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(GIB, 0, GIB))
    _is(machine.check_shared_memory(tmp_path, root), "warn", "less than 3.0 GiB", "--shm-size")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    _is(machine.check_shared_memory(tmp_path, root), "fail", "cannot be written to", "1777")


@pytest.mark.parametrize(
    ("total", "free", "status", "words"),
    [
        (100, 50, "pass", ["50.0 GiB are free"]),
        (100, 9, "warn", ["less than 10 GiB", "RAY_TMPDIR"]),
        (100, 0.5, "fail", ["less than 1 GiB", "RAY_TMPDIR"]),
        (1000, 20, "warn", ["98 % full"]),
    ],
)
def test_a_full_disk_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: float, free: float, status: str, words: list[str]
) -> None:
    used = shutil._ntuple_diskusage(*(int(gib * GIB) for gib in (total, total - free, free)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used)
    for storage in (str(tmp_path / "runs" / "later"), "s3://bucket/runs"):
        _is(machine.check_disk(storage), status, *words)


def test_a_folder_that_ray_cannot_use_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "r\u00e4y"))
    _is(machine.check_disk("s3://bucket/runs"), "fail", "outside ASCII", "set RAY_TMPDIR")


def test_ports_in_use_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        _is(machine.check_ports({port: "endpoint"}), "warn", f"{port} (endpoint)", "http.port")
    _is(machine.check_ports({port: "endpoint"}), "pass")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", refuse)
    _is(machine.check_ports({}), "fail", "Cannot assign", "ip link set lo up")


def test_gpus_are_skipped_warned_of_or_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "version"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _is(machine.check_gpu(False, driver), "skip")
    _is(machine.check_gpu(True, driver), "fail", "requests GPUs", "submit the job")
    driver.touch()
    _is(machine.check_gpu(False, driver), "warn", "CUDA build")
    _is(machine.check_gpu(True, driver), "fail", "CUDA build")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    # There is no such device, so that the product raises as on a broken GPU.
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("device-side assert")))
    _is(machine.check_gpu(False, driver), "fail", "device-side assert", "CUDA_VISIBLE_DEVICES")


@pytest.mark.gpu
def test_a_gpu_computes() -> None:
    _is(machine.check_gpu(True), "pass", "GiB free")


def test_every_exception_of_a_check_is_a_failure_with_a_remedy() -> None:
    def check(error: Exception) -> Finding:
        raise error

    safe = guarded("a check", "do something")(check)
    assert safe(SystemFailure("It broke; repair it.")) == Finding("a check", "fail", "It broke", "repair it.")
    assert safe(SystemFailure("It broke.")) == Finding("a check", "fail", "It broke.", "do something")
    assert safe(KeyError("a\nb")) == Finding("a check", "fail", "KeyError: 'a\\nb'", "do something")
    assert safe(ValueError()) == Finding("a check", "fail", "ValueError: no message", "do something")
