"""The environment of every test, set before torch, Ray or MLflow is imported, and the fixtures that all tests share."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .object_storage import FaultyProxy

ROOT = Path(__file__).resolve().parent.parent

# Threads of a test process and of each worker that it starts. One is the default, so that Ray's workers do not fight
# over the cores; `make test-portable` also runs with two.
_THREADS = os.environ.get("PARCELRAY_TEST_THREADS", "1")

# Ray's sockets are below RAY_TMPDIR. The path of a socket may have at most 107 bytes, so the folder has a short name.
_SESSION_DIR = Path(tempfile.mkdtemp(prefix="pr"))


def _free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


_ENVIRONMENT = {
    "OMP_NUM_THREADS": _THREADS,
    "MKL_NUM_THREADS": _THREADS,
    "TOKENIZERS_PARALLELISM": "false",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Tests write caches, tokens and logs here instead of the home folder of the user.
    "HOME": str(_SESSION_DIR),
    "HF_HOME": str(_SESSION_DIR / "hf"),
    "MPLCONFIGDIR": str(_SESSION_DIR / "mpl"),
    "RAY_TMPDIR": str(_SESSION_DIR),
    "MPLBACKEND": "Agg",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # By default the Train controller polls its workers every two seconds, and each report waits for the poll.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's default is nice 15. Next to other busy processes its workers then get 3 % of a core, and time limits inside
    # Ray, for example for the start of Serve's proxy, expire before the workers have done anything.
    "RAY_worker_niceness": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
    # The S3 server of the fixture `s3`. Ray's workers get the environment in which Ray starts, so it is set here.
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{_free_port()}",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Ray's workers and subprocesses of tests find the package even if it is not installed.
    "PYTHONPATH": os.pathsep.join(part for part in (str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")) if part),
}
_LEFT_OUT = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
)

os.environ.update(_ENVIRONMENT)
for name in _LEFT_OUT:
    os.environ.pop(name, None)


def pytest_unconfigure() -> None:
    shutil.rmtree(_SESSION_DIR, ignore_errors=True)


# The slowest test files come first, so that two processes that share the files end at about the same time.
_LONGEST = (
    "cluster/test_hosts.py",
    "training/test_trainer.py",
    "cluster/test_jobs.py",
    "evaluation/passes/test_ray_pass.py",
    "tuning/test_run.py",
    "pipelines/test_quickstart.py",
    "tuning/test_training_trials.py",
    "training/test_in_process.py",
    "cli/test_cli.py",
    "evaluation/predict/test_predictor.py",
    "training/test_nlvr_training.py",
    "serving/engine/test_offline_parity.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [str(ROOT / "tests" / name) for name in _LONGEST]
    items.sort(key=lambda item: names.index(str(item.path)) if str(item.path) in names else len(names))
    without_gpu = _why_no_gpu() if any(item.get_closest_marker("gpu") for item in items) else None
    for item in items:
        missing = [_why_no_data(name) for name in _DATA if name in getattr(item, "fixturenames", ())]
        missing.append(without_gpu if item.get_closest_marker("gpu") else None)
        missing.append(_why_no_browser() if item.get_closest_marker("browser") else None)
        for reason in filter(None, missing):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _threads() -> None:
    """Resets the number of threads, which an earlier test may have changed for the whole process."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(_THREADS))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Returns the root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def nlvr_dir() -> Path:
    """Returns the folder with dev.parquet and test.parquet of NLVR; without them the test is skipped."""
    return Path(os.environ["PARCELRAY_NLVR"])


@pytest.fixture(scope="session")
def puzzlevqa_dir() -> Path:
    """Returns the folder with TYPE.json and images/ of PuzzleVQA; without them the test is skipped."""
    return Path(os.environ["PARCELRAY_PUZZLEVQA"])


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Starts one local Ray with four logical CPUs for all tests; a test that needs a separate Ray starts a process."""
    # Imported here, because most test runs need no Ray, and it takes seconds to load.
    from parcelray.cluster import session

    # Without an address Ray would join a cluster that already runs on this machine.
    with session.ray_session("local", num_cpus=4, object_store_bytes=300 * 1024**2):
        yield


@pytest.fixture(scope="session")
def s3_process() -> Iterator[subprocess.Popen[bytes]]:
    """Returns the process of an S3 server at AWS_ENDPOINT_URL, which has one bucket."""
    from .object_storage import s3_server

    with s3_server(os.environ["AWS_ENDPOINT_URL"]) as server:
        yield server


@pytest.fixture
def s3(s3_process: subprocess.Popen[bytes], tmp_path: Path) -> str:
    """Returns an empty folder on object storage, s3://BUCKET/FOLDER."""
    return f"s3://bucket{tmp_path}"


@pytest.fixture
def faulty_s3(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator["FaultyProxy"]:
    """Returns the proxy through which this process reaches the S3 server of the fixture `s3`."""
    from parcelray.s3_storage import PatientS3FileSystem

    from .object_storage import FaultyProxy

    proxy = FaultyProxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    # An instance keeps the address with which it was created.
    PatientS3FileSystem.clear_instance_cache()
    yield proxy
    PatientS3FileSystem.clear_instance_cache()
    proxy.close()


@pytest.fixture(scope="session")
def tiny_start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the section `model` of a job that starts from a tiny untrained checkpoint.

    A job that starts from random weights would train its tokenizer in every worker and reader.
    """
    # Imported here, because it loads torch and transformers, which many test files do not need.
    from .tiny import tiny_checkpoint

    return {"type": "checkpoint", "reference": str(tiny_checkpoint(tmp_path_factory.mktemp("start"), seed=3))}


@pytest.fixture(scope="module")
def without_pictures() -> Iterator[None]:
    """Replaces figures of evaluations by empty files; drawing takes as long as the answers of a tiny model."""

    def plot(summary: object, path: Path) -> None:
        path.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parcelray.evaluation.results.plot_evaluation", plot)
        yield


# Fixture of a folder with public data -> its environment variable, and names that must be in the folder.
_DATA = {
    "nlvr_dir": ("PARCELRAY_NLVR", ("dev.parquet", "test.parquet")),
    "puzzlevqa_dir": ("PARCELRAY_PUZZLEVQA", ("venn.json", "images")),
}


def _why_no_data(fixture: str) -> str | None:
    variable, names = _DATA[fixture]
    folder = os.environ.get(variable)
    if not folder:
        return f"needs public data: set {variable} to the folder that holds {' and '.join(names)}"
    missing = [name for name in names if not (Path(folder) / name).exists()]
    return f"{variable}={folder} has no {' and no '.join(missing)}" if missing else None


def _why_no_browser() -> str | None:
    if shutil.which("chromedriver") and shutil.which("chromium"):
        return None
    return "needs a browser: apt-get install -y chromium chromium-driver"


def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device"
