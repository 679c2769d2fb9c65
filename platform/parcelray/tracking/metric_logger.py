"""The interface through which a training logs metrics; does not import MLflow, which only rank 0 needs."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from parcelray.tracking.store import UnsentMetric


class MetricLogger(Protocol):
    """Receives the metrics of one run; used on rank 0 only."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at an optimizer step.

        A step at or before the last recorded step of a metric is dropped, so a resumed run records nothing twice.
        """
        ...

    def flush(self) -> list[UnsentMetric]:
        """Send what is buffered, without waiting for a store that does not answer.

        Returns:
            The metrics that the store does not have yet. They stay buffered; the training loop also saves them with a
            checkpoint, so that a run that is resumed from it can send them.
        """
        ...

    def restore(self, unsent: Sequence[UnsentMetric]) -> None:
        """Buffer metrics that an earlier attempt of the run could not send, as returned by `flush`."""
        ...

    def close(self) -> None:
        """Wait until everything logged so far is stored.

        Raises:
            SystemFailure: the store has not answered for minutes.
        """
        ...


class NoMetrics:
    """Records nothing: for ranks above 0 and for runs without tracking."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Drop the metrics."""

    def flush(self) -> list[UnsentMetric]:
        """Return no metric: none is buffered."""
        return []

    def restore(self, unsent: Sequence[UnsentMetric]) -> None:
        """Drop the metrics."""

    def close(self) -> None:
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
