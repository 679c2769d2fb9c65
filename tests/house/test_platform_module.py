"""The folder `platform/` must never hide the module `platform` of the standard library."""

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SHOW = "import platform; print(platform.__file__); print(platform.python_version())"


def test_the_folder_is_not_a_package(repo_root: Path) -> None:
    assert not (repo_root / "platform" / "__init__.py").exists()


@pytest.mark.parametrize("arguments", [["-c", SHOW], ["-"]], ids=["-c", "stdin"])
def test_the_standard_library_has_precedence_in_the_repository_root(repo_root: Path, arguments: list[str]) -> None:
    # The root itself in PYTHONPATH is the worst case: it comes before the standard library.
    environment = os.environ | {"PYTHONPATH": str(repo_root)}
    done = subprocess.run(
        [sys.executable, *arguments],
        input=SHOW,
        cwd=repo_root,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [_standard_library_file(), platform.python_version()]


@pytest.mark.ray
def test_the_standard_library_has_precedence_in_a_ray_worker(ray_session: None) -> None:
    import ray

    # Defined here, so that it is pickled by value: a worker may not be able to import the tests.
    @ray.remote(num_cpus=1)
    def look() -> tuple[str | None, str, str]:
        import platform as module

        import parcelray

        return module.__file__, module.python_version(), parcelray.__version__

    import parcelray

    assert ray.get(look.remote()) == (_standard_library_file(), platform.python_version(), parcelray.__version__)


def _standard_library_file() -> str:
    return str(Path(sysconfig.get_path("stdlib")) / "platform.py")
