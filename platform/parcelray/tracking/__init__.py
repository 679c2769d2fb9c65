"""MLflow runs and metrics (`mlflow_tracker`), model registry (`registry`), and folders of runs (`run_folder`)."""

import os

# MLflow reads these when it is imported. It would report usage to its vendor; a platform for closed clusters must not.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow's own messages (tables created, signatures checked) would appear between the lines of a run.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
# Two lines with addresses at the end of every run, also of each trial of a search.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# Bars of each file of a model would appear there, too.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
