"""Commands in unusual environments: special paths, a second user of the machine, and workers that cannot start."""

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..processes import LIMIT_S, own_ray
from ..training.conftest import TINY

pytestmark = pytest.mark.ray

NOBODY = 65534
MINI_BASE = {"reference": "mini_base"}
TRAINING: dict[str, Any] = TINY | {
    "name": "short",
    "model": {"type": "checkpoint", **MINI_BASE},
    "connector": {"type": "parcel", "num_heads": 3},
    "storage": "runs",
    "training": {"steps": 2, "images_per_step": 4, "log_every_steps": 1},
    "validation": {"samples": 1, "budgets": [16]},
    "checkpointing": {"every_steps": 2},
    "scaling": {"num_workers": 1},
}
JOBS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "train": (["train"], TRAINING),
    "evaluate": (
        ["evaluate", "run"],
        {
            "kind": "evaluate",
            "name": "short",
            "model": {"type": "checkpoint", **MINI_BASE},
            "benchmarks": [{"name": "mini", "source": {"samples": 1}}],
            "budgets": ["full"],
            "tracking": {"uri": None},
        },
    ),
    "serve": (
        ["serve"],
        {
            "kind": "serve",
            "name": "short",
            "model": {**MINI_BASE, "connector": {"type": "m3"}},
            "budgets": {"offered": [16]},
        },
    ),
}
# Lines of Ray and gRPC: `[2026-11-29 04:30:32,426 E 1 2] core_worker.cc:1: ...`, `(raylet) ...`, `E0000 00:00:00 1
# tcp_posix.cc:1] ...`.
INTERNALS = re.compile(r"\.cc:\d+|\((raylet|pid=|\w+ pid=)|ray-project/ray|Traceback", re.MULTILINE)
MISSING_INTERPRETER = """
import sys
from parcelray.cli import main
from parcelray.cluster import session

session._worker_interpreter = lambda: "/nowhere/python"
main()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary folder with a path that is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="pr", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _environment(folder: Path) -> dict[str, str]:
    """The environment of a user: no variables of another test's Ray, and `folder` as the system's temporary folder."""
    kept = {name: value for name, value in own_ray().items() if name not in ("RAY_TMPDIR", "PYTHONPATH")}
    return kept | {"TMPDIR": str(folder), "HOME": str(folder)}


def _virtual_environment(folder: Path, python: str, root: Path) -> Path:
    """Creates a virtual environment with the current packages and the repository's parcelray; gives its interpreter."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=LIMIT_S)
    (packages,) = folder.glob("lib/python*/site-packages")
    paths = [sysconfig.get_path("purelib"), str(root / "platform")]
    (packages / "shared.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    return folder / "bin" / "python"


def _run(command: str, python: Path, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    words, job = JOBS[command]
    job = job | options.pop("changes", {})
    if command == "serve":
        with socket.create_server(("127.0.0.1", 0)) as free:
            job = job | {"http": {"port": free.getsockname()[1]}}
    file = folder / f"{command}.yaml"
    file.write_text(yaml.safe_dump(job), encoding="utf-8")
    code = options.pop("code", "from parcelray.cli import main; main()")
    environment = options.pop("env")
    return subprocess.run(
        [str(python), "-c", code, *words, str(file)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        **options,
    )


def _assert_trained(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(folder.glob("runs/train/*/model/config.json"))
    assert not INTERNALS.search(done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.nightly
def test_a_training_runs_in_a_path_with_a_space_and_a_non_ascii_letter(folder: Path, repo_root: Path) -> None:
    working_folder = folder / "my f\u00f6lder"
    working_folder.mkdir()
    python = _virtual_environment(working_folder / "venv", sys.executable, repo_root)
    _assert_trained(_run("train", python, working_folder, env=_environment(folder)), working_folder)


@pytest.mark.nightly
def test_a_training_runs_for_a_second_user_of_a_machine_on_which_root_ran_ray(folder: Path, repo_root: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root: it runs a training as another user")
    names = (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}")
    usable = [name for name in names if shutil.which(name) and _can_run(name)]
    if not usable or not _can_run("cat", str(repo_root / "pyproject.toml")):
        pytest.skip("needs an interpreter and a checkout that other users can read")
    folder.chmod(0o1777)
    for name in ("ray", "_ray_lockfiles"):
        (folder / name).mkdir(mode=0o755)
    home = folder / "home"
    home.mkdir()
    python = _virtual_environment(home / "venv", usable[0], repo_root)
    os.chown(home, NOBODY, NOBODY)
    environment = _environment(folder) | {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "MPLCONFIGDIR": str(home / "mpl"),
    }
    # The report evaluates with Ray Data, whose actors Ray's C++ part used to report on the terminal.
    report = {"report": {"samples": 1, "budgets": [16]}}
    done = _run("train", python, home, env=environment, user=NOBODY, group=NOBODY, extra_groups=[], changes=report)
    _assert_trained(done, home)
    assert not list((folder / "_ray_lockfiles").iterdir())


def _can_run(*command: str) -> bool:
    arguments = command if len(command) > 1 else (*command, "-c", "pass")
    try:
        done = subprocess.run(arguments, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=False)
    except PermissionError:
        return False
    return done.returncode == 0


@pytest.mark.nightly
@pytest.mark.parametrize("command", ["train", "evaluate", "serve"])
def test_a_missing_worker_interpreter_ends_a_command_with_the_reason(
    folder: Path, repo_root: Path, command: str
) -> None:
    environment = _environment(folder) | {"PYTHONPATH": str(repo_root / "platform")}
    done = _run(command, Path(sys.executable), folder, env=environment, code=MISSING_INTERPRETER)
    assert done.returncode == 1, done.stdout + done.stderr
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("failed: Ray's workers ")
    assert "/nowhere/python: No such file or directory" in sentence
