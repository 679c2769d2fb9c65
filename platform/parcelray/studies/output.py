"""What the studies of `parcelray analyze` have in common: JSON files, cells of tables, and the MLflow run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parcelray.config.train import TrackingConfig
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, tracked_run
from parcelray.tracking.store import ensure_store


def interval_cell(interval: Interval) -> str:
    """Returns an estimate and its limits as the text of a table's cell."""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes a JSON file and returns its path."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def record_study(
    tracking: TrackingConfig,
    name: str,
    params: Mapping[str, str | int],
    metrics: Mapping[str, float],
    files: Sequence[Path],
) -> None:
    """Logs a finished study as an MLflow run; does nothing without a tracking URI.

    Args:
        tracking: MLflow settings.
        name: name of the run.
        params: parameters.
        metrics: metrics; NaN values are left out.
        files: files to upload, pictures as figures.
    """
    if tracking.uri is None:
        return
    uri = ensure_store(tracking.uri)
    with tracked_run(uri, tracking.experiment, name, params=dict(params)) as run_id:
        tracker = MlflowRunLogger(uri, run_id)
        tracker.log_metrics({key: value for key, value in metrics.items() if value == value}, 0)
        for file in files:
            tracker.log_figure_file(file) if file.suffix == ".png" else tracker.log_artifact(file)
        tracker.close()
