"""MLflow stores for tests, copied from one empty database because creating the schema takes a second."""

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from parcelray.tracking.store import ensure_store


def new_store(folder: Path) -> str:
    """Creates an empty store in a folder and returns its tracking URI."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_empty_database(), folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


@cache
def _empty_database() -> Path:
    # HOME is the folder of this test session (see conftest.py), which is removed at its end.
    path = Path(tempfile.mkdtemp(prefix="store", dir=os.environ["HOME"])) / "mlflow.db"
    ensure_store(f"sqlite:///{path}")
    return path
