"""Extraction of the reason why workers do not start from Ray's logs, and the limits of the wait for a worker."""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RaySystemError, WorkerCrashedError

from parcelray.cluster import session, worker_start
from parcelray.cluster.worker_start import START_LIMIT_S, await_worker, explained_worker_failures, failure_reason
from parcelray.errors import SystemFailure

SHELL = "bash: line 1: /nowhere/python: No such file or directory"
MEMORY = "PlasmaAllocator initialization failed. It's likely we don't have enough space in /dev/shm"
ABORT = f"""\
[2026-11-29 04:40:26,742 E 23598 23621] (raylet) dlmalloc.cc:215: mmap failed with error: Cannot allocate memory
[2026-11-29 04:40:26,859 C 23598 23621] (raylet) plasma_allocator.cc:79:  An unexpected state. Check failed: {MEMORY}
*** StackTrace Information ***
/ray/core/src/ray/raylet/raylet(+0xff770a) [0x562b2751970a] ray::operator<<()
/lib/x86_64-linux-gnu/libc.so.6(+0x1098ec) [0x7f373b7278ec]
"""
RETRY = (
    "[2026-11-29 04:30:32,426 E 5337 5337] (raylet) worker_pool.cc:660: Some workers of the worker process(5639) have"
    " not registered within the timeout. The process is dead, probably it crashed during start."
)
START = (
    "[2026-11-29 04:30:32,700 I 5337 5337] (raylet) worker_pool.cc:564: Started worker process with pid {} worker_id=4b"
)


@pytest.mark.parametrize(
    ("logs", "reason"),
    [
        ({"raylet.err": f"{SHELL}\n{RETRY}\n"}, SHELL),
        ({"raylet.err": ABORT}, MEMORY),
        (
            {"worker-1.err": ":job_id:01000000\nImportError: libfoo.so: cannot open\n"},
            "ImportError: libfoo.so: cannot open",
        ),
        (
            {"raylet.out": f"{RETRY}\n[2026-11-29 04:30:33,000 I 1 1] (raylet) main.cc:1: fine\n"},
            "crashed during start",
        ),
        ({"raylet.err": ""}, "the last line of an exception"),
        ({}, "the last line of an exception"),
    ],
)
def test_the_reason_is_the_log_line_with_the_cause(tmp_path: Path, logs: dict[str, str], reason: str) -> None:
    for name, text in logs.items():
        (tmp_path / name).write_text(text)
    found = failure_reason(tmp_path, "Traceback:\nthe last line of an exception\n")
    assert reason in found
    assert str(tmp_path) in found
    assert "\n" not in found


def test_a_missing_reason_is_reported(tmp_path: Path) -> None:
    assert failure_reason(tmp_path / "missing").startswith("no reason is logged")


@pytest.fixture
def no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces Ray by one in which no worker starts, and gives the folder of its logs."""
    node = SimpleNamespace(get_logs_dir_path=lambda: str(tmp_path))
    monkeypatch.setattr(ray._private.worker, "global_worker", SimpleNamespace(node=node))
    monkeypatch.setattr(worker_start, "_start", SimpleNamespace(remote=object))
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: ([], refs))
    (tmp_path / "raylet.err").write_text(f"{SHELL}\n")
    return tmp_path


@pytest.mark.parametrize("on_this_host", [True, False])
def test_the_wait_for_a_worker_that_neither_starts_nor_ends_is_limited(no_worker: Path, on_this_host: bool) -> None:
    (no_worker / "raylet.out").write_text(START.format(os.getpid()) + "\n")
    clock: Any = itertools.count(step=10.0).__next__
    with pytest.raises(SystemFailure, match=rf"^No Ray worker started within {START_LIMIT_S:.0f} s: {SHELL}"):
        await_worker(on_this_host=on_this_host, clock=clock)


def test_the_death_of_a_starting_worker_ends_the_wait(no_worker: Path) -> None:
    child = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(child, 0)
    (no_worker / "raylet.out").write_text(f"{START.format(os.getpid())}\n{START.format(child)}\n")
    with pytest.raises(SystemFailure, match=f"^Ray's workers die while they start: {SHELL}"):
        await_worker(on_this_host=True, clock=lambda: 0.0)


@pytest.mark.parametrize(("reason", "attempts"), [("Timed out waiting for file x", 3), ("Cannot allocate memory", 1)])
def test_the_start_of_ray_is_retried_only_after_a_timeout(
    monkeypatch: pytest.MonkeyPatch, reason: str, attempts: int
) -> None:
    calls = []

    def fails(*arguments: Any) -> None:
        calls.append(arguments)
        raise SystemFailure(reason)

    monkeypatch.setattr(session, "_start", fails)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(SystemFailure, match=reason):
        session._start_with_retries(None, None, None, False)
    assert len(calls) == attempts


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            RaySystemError("its stack", "Traceback:\nImportError: libfoo.so: cannot open"),
            "ImportError: libfoo.so: cannot open.",
        ),
        (RayActorError(error_msg="The actor died.\n\nImportError: libfoo.so.\n"), "ImportError: libfoo.so."),
        (WorkerCrashedError(), "worker died unexpectedly"),
    ],
)
def test_the_death_of_a_worker_is_reported_in_one_sentence(error: Exception, sentence: str) -> None:
    with (
        pytest.raises(SystemFailure, match=r"^A Ray worker died: [^\n]+\.$") as failure,
        explained_worker_failures(),
    ):
        raise error
    assert sentence in str(failure.value)
