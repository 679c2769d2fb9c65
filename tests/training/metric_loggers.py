"""Metric loggers of tests.

Ray Train's controller and workers load this module, so it imports nothing that they need not load.
"""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from ..processes import wait_until


class Losses:
    """A metric logger that keeps the losses, by step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keeps the loss."""
        if "train/loss" in metrics:
            self.losses[step] = metrics["train/loss"]

    def flush(self) -> None:
        """Has nothing buffered."""


class KillsOnce:
    """A metric logger that notes each step, and once kills its own worker with SIGKILL: at step 5, when the checkpoint of step 3 counts."""

    def __init__(self, steps: Path, checkpoint: Path) -> None:
        self._steps = steps
        self._checkpoint = checkpoint

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Notes the step, and kills the process or not."""
        if "train/loss" not in metrics:
            return
        before = self._steps.read_text(encoding="utf-8").split() if self._steps.exists() else []
        self._steps.write_text(" ".join([*before, str(step)]), encoding="utf-8")
        if step == 5 and "5" not in before:
            # A checkpoint counts once the controller has polled it; it then calls `on_report`.
            wait_until(self._checkpoint.exists, "the controller has the checkpoint of step 3")
            os.kill(os.getpid(), signal.SIGKILL)

    def flush(self) -> None:
        """Has nothing buffered."""
