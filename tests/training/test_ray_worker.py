"""What Ray Train's controller loads before it starts the workers."""

import subprocess
import sys

LOADS = """
import sys
import parcelray.training.ray_worker, parcelray.tracking.tracker
print(sorted({"torch", "transformers", "mlflow"} & sys.modules.keys()))
"""


def test_the_controller_needs_neither_the_models_libraries_nor_mlflow() -> None:
    found = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
