"""What the training loop needs of an experiment tracker. The tracker itself lives above training and is handed in."""

from collections.abc import Mapping
from typing import Protocol


class MetricLogger(Protocol):
    """Receives metrics on rank 0."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records metrics of a step; a (metric, step) that is there already is not recorded again."""
        ...

    def flush(self) -> None:
        """Writes what is buffered, so that no metric before a checkpoint can be lost."""
        ...


class NoMetrics:
    """Records nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Drops the metrics."""

    def flush(self) -> None:
        """Has nothing to write."""
