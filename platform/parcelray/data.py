"""Refusal of MLflow model versions that were registered before the package was restructured.

Each version holds a copy of the Python file that loads it, and the copies of those versions import `parcelray.data`.
Nothing else does: the data sets of today are in `parcelray.datasets`.
"""

raise ImportError(
    "This MLflow model version was registered by parcelray before its modules moved (November 2026), so its loading"
    " code no longer runs; register it again with `parcelray models promote JOB --set candidate=FOLDER`, or use"
    " FOLDER as a model reference, where FOLDER is the version's folder artifacts/model."
)
