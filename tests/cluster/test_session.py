"""Ray sessions: addresses, and a private local instance that is removed completely."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from parcelray.cluster.session import default_num_cpus, import_path, ray_session
from parcelray.errors import UserError


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # pytest's own temporary folders are too long for Ray's socket names.
    with tempfile.TemporaryDirectory(prefix="pr", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("HOME", folder)
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_worker_niceness"):
            monkeypatch.delenv(name, raising=False)
        yield Path(folder)


def test_a_local_instance_has_at_least_four_logical_cpus() -> None:
    assert default_num_cpus() >= 4


def test_the_import_path_is_the_folder_above_the_package() -> None:
    path = import_path()
    assert path is None or (Path(path) / "parcelray" / "cluster" / "session.py").is_file()


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "auto"])
def test_an_address_that_is_not_a_gcs_is_rejected(
    ray_folder: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match="cannot be joined from here"), ray_session():
        pass
    assert os.environ["RAY_ADDRESS"] == address


def test_an_unreachable_address_is_reported_at_once(ray_folder: Path) -> None:
    with pytest.raises(UserError, match=r"Nothing responds at 127\.0\.0\.1:9 "), ray_session("127.0.0.1:9"):
        pass
    assert not ray.is_initialized()


# Runs in a separate process: a process has only one Ray connection, and that of the tests may already be in use.
PRIVATE = """
import logging
import os
import threading
from pathlib import Path
import ray
from ray._private.utils import publish_error_to_driver
from parcelray.cluster.session import default_num_cpus, ray_session

if __name__ == "__main__":

    @ray.remote
    def probe():
        import parcelray.config.base

        return {"module": parcelray.config.base.__file__, "address": os.environ["RAY_ADDRESS"], "nice": os.nice(0)}

    class Published(logging.Handler):
        arrived = threading.Event()

        def emit(self, record):
            if record.getMessage() == "a task is retried":
                self.arrived.set()

    logger = logging.getLogger("parcelray.ray")
    logger.addHandler(Published())
    logger.setLevel(logging.INFO)
    before = dict(os.environ)
    with ray_session() as session:
        assert session.owned
        assert session.resources["CPU"] == default_num_cpus()
        worker = ray.get(probe.remote())
        assert Path(worker["module"]).is_file()
        assert worker["address"] == os.environ["RAY_ADDRESS"]
        assert worker["nice"] == os.nice(0), "workers have the driver's priority"
        assert worker["address"].split(":")[1] == session.address.split(":")[1]
        with ray_session() as inner:
            assert not inner.owned
            assert inner.address == session.address
        assert ray.is_initialized()
        # Ray would print the message as `(raylet) ...`; here only the logger receives it.
        publish_error_to_driver("test", "a task is retried", gcs_client=ray._private.worker.global_worker.gcs_client)
        assert Published.arrived.wait(300)
    assert not ray.is_initialized()
    assert dict(os.environ) == before
    print("ENDED")
"""


@pytest.mark.ray
def test_a_local_session_is_private_and_restores_the_environment(ray_folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PRIVATE], capture_output=True, text=True, timeout=400, check=False)
    assert done.stdout == "ENDED\n", done.stderr[-3000:]
    assert list(ray_folder.glob("ray/session_*"))
    readable = [path for path in ray_folder.glob(".ray/*") if stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert readable == []
