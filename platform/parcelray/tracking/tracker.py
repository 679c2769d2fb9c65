"""What the rest of the platform knows of experiment tracking: a small interface, and one implementation that does nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from parcelray.tracking.entries import ParamValue, RunStatus


class Tracker(Protocol):
    """Records one run. Only rank 0 of a worker group holds a tracker that records anything."""

    def log_params(self, params: Mapping[str, ParamValue]) -> None:
        """Records parameters that the run does not have yet; a value once written stays."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records metrics at an optimizer step.

        A step at or before the last recorded one of a metric is dropped, so a resumed run repeats nothing.
        """
        ...

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags; the last value wins."""
        ...

    def log_artifact(self, path: Path) -> None:
        """Uploads a small file or folder (reports, configs); checkpoints stay in storage and are named by a tag."""
        ...

    def log_figure_file(self, path: Path) -> None:
        """Uploads an image file to the run's figures."""
        ...

    def flush(self) -> None:
        """Returns once everything logged so far is in the store; the train loop calls it before it reports a checkpoint."""
        ...

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Flushes, and notes how this writer ended. The run itself is ended by the driver."""
        ...


class NoopTracker:
    """Records nothing: ranks above 0, tests, and runs without tracking."""

    def log_params(self, params: Mapping[str, ParamValue]) -> None:
        """See `Tracker`."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""

    def log_artifact(self, path: Path) -> None:
        """See `Tracker`."""

    def log_figure_file(self, path: Path) -> None:
        """See `Tracker`."""

    def flush(self) -> None:
        """See `Tracker`."""

    def close(self, status: RunStatus = "FINISHED") -> None:
        """See `Tracker`."""


def open_tracker(tracking_uri: str | None, run_id: str | None, *, rank: int = 0) -> Tracker:
    """Opens the tracker of a worker.

    Args:
        tracking_uri: as returned by `store.ensure_store` in the driver; None for no tracking.
        run_id: the MLflow run that the driver started; None for no tracking.
        rank: rank of this worker; only rank 0 records.

    Returns:
        A tracker that writes to the run, or a `NoopTracker`.
    """
    if tracking_uri is None or run_id is None or rank != 0:
        return NoopTracker()
    from parcelray.tracking.mlflow_tracker import MlflowRunLogger

    return MlflowRunLogger(tracking_uri, run_id)
