"""Metric loggers of tests.

Ray Train's controller and workers load this module, so it imports no heavy library.
"""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from parcelray.tracking.metric_logger import NoMetrics

from ..processes import wait_until


class Losses(NoMetrics):
    """A metric logger that keeps the loss of each step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the loss."""
        if "train/loss" in metrics:
            self.losses[step] = metrics["train/loss"]


class KillsOnce(NoMetrics):
    """A metric logger that records each step and once kills its worker, at step 5 after the checkpoint of step 3."""

    def __init__(self, steps: Path, checkpoint: Path) -> None:
        self._steps = steps
        self._checkpoint = checkpoint

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the step, and kill the process at step 5 the first time."""
        if "train/loss" not in metrics:
            return
        before = self._steps.read_text(encoding="utf-8").split() if self._steps.exists() else []
        self._steps.write_text(" ".join([*before, str(step)]), encoding="utf-8")
        if step == 5 and "5" not in before:
            # A checkpoint is valid only after the controller has polled it; the controller then calls `on_report`.
            wait_until(self._checkpoint.exists, "the controller has the checkpoint of step 3")
            os.kill(os.getpid(), signal.SIGKILL)
