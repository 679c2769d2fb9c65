"""Writes samples of an endpoint's requests to MLflow in a background thread, so that no request waits for it.

Each batch is one table (a JSON file with columns and rows) among the artifacts of the endpoint's run.
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
    """Queues records of requests and writes them to MLflow in a background thread.

    Args:
        tracking_uri: as returned by `store.ensure_store`.
        experiment: name of the MLflow experiment.
        run_name: identity of the endpoint, whose run gets the tables.
        dropped: called with the number of lost records, when the queue is full or the store does not accept them.
        capacity: largest number of queued records.
        batch: largest number of records per table.
        period_s: longest time that a record waits for its table to fill, in seconds.
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
        """Queue a record, or drop it if the queue is full; returns at once."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped(1)

    def close(self, timeout_s: float = 10.0) -> None:
        """Write the queued records and end the run; gives up after twice the timeout (seconds) without progress."""
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
            with contextlib.suppress(Exception):  # the store does not answer, and this process is about to end
                end_run(self._uri, self._run_id, "FINISHED")

    def _next_batch(self) -> tuple[list[Mapping[str, Any]], bool]:
        """Wait for the records of the next table.

        Returns:
            The records that arrive within one period after the first, and whether the queue was closed.
        """
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
            # File names sort by time; the number distinguishes tables of the same second.
            name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{self._written:06d}.json"
            MlflowClient(tracking_uri=self._uri).log_dict(self._run_id, table, f"{FOLDER}/{name}")
            self._written += 1
        except Exception:  # whatever the store raises: failing to record samples must not affect requests
            logger.warning("%d request samples could not be written to MLflow", len(records), exc_info=True)
            self._dropped(len(records))
