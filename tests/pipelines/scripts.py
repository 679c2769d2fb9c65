"""Helpers for the scripts of pipelines/: as modules in this process, and as processes."""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ..processes import own_ray

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 1200
"""Timeout of a script, seconds; only a hanging script reaches it."""


def script(name: str) -> ModuleType:
    """Imports a script as a module, which does not run its `main`."""
    spec = importlib.util.spec_from_file_location(f"pipelines_{name}", ROOT / "pipelines" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sets(*changes: str) -> list[str]:
    """Returns changes of a job as command-line arguments."""
    return [part for change in changes for part in ("--set", change)]


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a new process, as a user does."""
    command = _command(name, arguments)
    return subprocess.run(
        command, cwd=ROOT, env=own_ray(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def kill_script(name: str, *arguments: str, log: Path, when: Callable[[], bool]) -> None:
    """Runs a script in a new process and kills it with SIGKILL as soon as a condition holds."""
    with log.open("w") as output:
        command = _command(name, arguments)
        driver = subprocess.Popen(command, cwd=ROOT, env=own_ray(), stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + LIMIT_S
            while not when():
                assert driver.poll() is None, f"ended before it could be killed:\n{log.read_text()}"
                assert time.monotonic() < deadline, f"hangs:\n{log.read_text()}"
                time.sleep(0.02)
        finally:
            driver.kill()
            driver.wait()


def _command(name: str, arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, f"pipelines/{name}.py", *arguments]
