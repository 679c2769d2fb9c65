"""The processes of the Ray instance of this driver: which of them died, and how to end all of them at once.

Ray itself does not report the death of a raylet: calls into Ray never return, and the workers keep running.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET
from ray.exceptions import RayError

_NEEDED = (PROCESS_TYPE_RAYLET, PROCESS_TYPE_GCS_SERVER)
"""Processes without which an instance does not work."""
_PROC = Path("/proc")


def dead_process() -> str | None:
    """Returns the name of a process of Ray that died and that this driver needs; None: none is known to have died.

    Of a joined cluster, this is only the raylet of this node; without its GCS, Ray itself ends the driver.
    """
    node: Any = ray._private.worker._global_node
    if node is None:
        return None
    if node.all_processes:
        return next((name for name, _ in node.dead_processes() if name in _NEEDED), None)
    try:
        here = ray.get_runtime_context().get_node_id()
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        dead = any(each["NodeID"] == here and not each["Alive"] for each in nodes)
    except RayError:
        return None
    return PROCESS_TYPE_RAYLET if dead else None


def kill_local_ray() -> None:
    """Kills all processes of the Ray instance that this process started; of a joined cluster, none.

    The workers are killed one by one: without their raylet they would run, and hold their ports, for another minute.
    """
    node: Any = ray._private.worker._global_node
    if node is None or not node.all_processes:
        return
    session = node.get_session_dir_path()
    node.kill_all_processes(check_alive=False, allow_graceful=False)
    for pid in _processes_of(session):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _processes_of(session: str) -> Iterator[int]:
    """Yields the processes whose output goes to a file in the folder of a Ray session, which all of its workers do."""
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        # The process may end in between, or belong to another user.
        with contextlib.suppress(OSError):
            if os.readlink(entry / "fd" / "2").startswith(f"{session}{os.sep}"):
                yield int(entry.name)
