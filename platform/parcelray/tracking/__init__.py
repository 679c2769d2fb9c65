"""The record of every run in MLflow: runs and metrics (`tracker`, `mlflow_tracker`) and promoted models (`registry`)."""

import os

# MLflow reads this once, when it is imported, and would report usage to its makers; a platform for closed clusters
# stays silent.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# What MLflow tells of itself (tables made, signatures checked) would stand between a run's own lines.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
