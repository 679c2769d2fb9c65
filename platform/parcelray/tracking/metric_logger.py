"""The interface through which a training logs metrics; does not import MLflow, which only rank 0 needs."""

from collections.abc import Mapping
from typing import Protocol


class MetricLogger(Protocol):
    """Receives the metrics of one run; used on rank 0 only."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at an optimizer step.

        A step at or before the last recorded step of a metric is dropped, so a resumed run records nothing twice.
        """
        ...

    def flush(self) -> None:
        """Return once everything logged so far is stored; the training loop calls it before it reports a checkpoint."""
        ...


class NoMetrics:
    """Records nothing: for ranks above 0 and for runs without tracking."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Drop the metrics."""

    def flush(self) -> None:
        """Do nothing: no metric is buffered."""


def open_metric_logger(tracking_uri: str | None, run_id: str | None) -> MetricLogger:
    """Open the logger of a run.

    Args:
        tracking_uri: as returned by `store.ensure_store` in the driver; None for a run without tracking.
        run_id: the MLflow run that the driver started; None for a run without tracking.
    """
    if tracking_uri is None or run_id is None:
        return NoMetrics()
    from parcelray.tracking.mlflow_tracker import MlflowRunLogger

    return MlflowRunLogger(tracking_uri, run_id)
