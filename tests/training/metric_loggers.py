"""Metric loggers of tests.

Ray Train's controller and workers load this module, so it imports no heavy library.
"""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from parcelray.tracking.metric_logger import MetricLogger, NoMetrics, open_metric_logger

from ..processes import wait_until


class Losses(NoMetrics):
    """A metric logger that keeps the loss of each step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the loss."""
        if "train/loss" in metrics:
            self.losses[step] = metrics["train/loss"]


def kills_once(steps: Path, checkpoint: Path, tracking_uri: str | None, run_id: str | None) -> MetricLogger:
    """Open the metric logger of a run, which once kills its worker, at step 5 after the checkpoint of step 3.

    Args:
        steps: file to which each trained step is added, also a repeated one.
        checkpoint: file that exists once the controller has the checkpoint of step 3.
        tracking_uri: as for `open_metric_logger`.
        run_id: as for `open_metric_logger`.
    """
    logger = open_metric_logger(tracking_uri, run_id)
    record = logger.log_metrics

    def log_metrics(metrics: Mapping[str, float], step: int) -> None:
        record(metrics, step)
        if "train/loss" not in metrics:
            return
        before = steps.read_text(encoding="utf-8").split() if steps.exists() else []
        steps.write_text(" ".join([*before, str(step)]), encoding="utf-8")
        if step == 5 and "5" not in before:
            # A checkpoint is valid only after the controller has polled it; the controller then calls `on_report`.
            wait_until(checkpoint.exists, "the controller has the checkpoint of step 3")
            os.kill(os.getpid(), signal.SIGKILL)

    logger.log_metrics = log_metrics  # type: ignore[method-assign]
    return logger
