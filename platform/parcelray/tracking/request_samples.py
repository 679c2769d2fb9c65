"""Samples of an endpoint's requests in MLflow: one writer, which never makes a request wait.

Each batch is one table (a JSON file of columns and rows) among the artifacts of the endpoint's run.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient

from parcelray.tracking.mlflow_tracker import end_run, start_run

logger = logging.getLogger(__name__)
FOLDER = "samples"


class RequestSamples:
    """Takes records of requests and writes them from a thread of its own.

    Args:
        tracking_uri: as returned by `store.ensure_store`.
        experiment: name of the MLflow experiment.
        run_name: identity of the endpoint, whose run gets the tables.
        dropped: told how many records were lost, because too many came or the store did not take them.
        capacity: records that wait at most.
        batch: records of a table at most.
        period_s: longest time that a record waits for its table to fill, seconds.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        dropped: Callable[[int], None],
        *,
        capacity: int = 2000,
        batch: int = 500,
        period_s: float = 10.0,
    ) -> None:
        self._uri = tracking_uri
        self._experiment = experiment
        self._run_name = run_name
        self._dropped = dropped
        self._waiting: queue.Queue[Mapping[str, Any] | None] = queue.Queue(capacity)
        self._batch = batch
        self._period_s = period_s
        self._run_id: str | None = None
        self._written = 0
        self._thread = threading.Thread(target=self._write_all, name="parcelray-samples", daemon=True)
        self._thread.start()

    def put(self, record: Mapping[str, Any]) -> None:
        """Keeps a record, or drops it where too many wait already; returns at once."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped(1)

    def close(self, timeout_s: float = 10.0) -> None:
        """Writes what waits, and ends the run; gives up when the store has not answered for twice the timeout, in seconds."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        closing = False
        while not closing:
            records, closing = self._next_batch()
            if records:
                self._write(records)
        if self._run_id is not None:
            with contextlib.suppress(Exception):  # the store is gone, and so is the process in a moment
                end_run(self._uri, self._run_id, "FINISHED")

    def _next_batch(self) -> tuple[list[Mapping[str, Any]], bool]:
        """Records that came within one period of the first, and whether they are the last."""
        first = self._waiting.get()
        if first is None:
            return [], True
        records = [first]
        due = time.monotonic() + self._period_s
        while len(records) < self._batch and (left := due - time.monotonic()) > 0:
            try:
                record = self._waiting.get(timeout=left)
            except queue.Empty:
                break
            if record is None:
                return records, True
            records.append(record)
        return records, False

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        try:
            if self._run_id is None:
                self._run_id = start_run(
                    self._uri, self._experiment, self._run_name, params={}, tags={"parcel.kind": "serve"}
                )
            columns = list(dict.fromkeys(name for record in records for name in record))
            table = {"columns": columns, "data": [[record.get(name) for name in columns] for record in records]}
            # In the order of their names; the number keeps those of one second apart.
            name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{self._written:06d}.json"
            MlflowClient(tracking_uri=self._uri).log_dict(self._run_id, table, f"{FOLDER}/{name}")
            self._written += 1
        except Exception:  # whatever the store has against it: samples must not cost an answer
            logger.warning("%d samples could not be written to MLflow", len(records), exc_info=True)
            self._dropped(len(records))
