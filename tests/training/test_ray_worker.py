"""What the controller of Ray Train says to the driver when workers fail."""

from typing import Any

import pytest
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from parcelray.errors import UserError
from parcelray.training.ray_worker import ControllerCallback

RESTART = (
    "All workers start again from the newest checkpoint, unless they have failed more than scaling.max_failures times."
)
DEATH = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed.
"""


class _Progress:
    """The handle of a progress actor, whose `notice.remote` keeps the lines here."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.remote = self.lines.append

    @property
    def notice(self) -> "_Progress":
        return self


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (
            {
                1: WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", RuntimeError(DEATH)),
                0: RuntimeError("Traceback (most recent call last):\nRuntimeError: Connection closed by peer"),
            },
            [
                "The worker of rank 0 failed: RuntimeError: Connection closed by peer",
                "The worker of rank 1 failed: The actor is dead because its worker process has died. Worker exit type:"
                " SYSTEM_ERROR",
                RESTART,
            ],
        ),
        ({3: MemoryError()}, ["The worker of rank 3 failed: MemoryError", RESTART]),
        ({0: UserError("the row r7 has no image"), 1: RuntimeError("Connection closed by peer")}, []),
    ],
)
def test_failed_workers_are_named_unless_the_training_ends(errors: dict[int, Exception], expected: list[str]) -> None:
    progress: Any = _Progress()
    ControllerCallback(progress, None).after_exception(None, errors)
    assert progress.lines == expected
