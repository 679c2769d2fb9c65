"""MLflow runs: the driver starts, resumes and ends them; workers only write to a run by its id (`MlflowRunLogger`).

Ray's and MLflow's own callbacks are not used. After a worker retry they open a second run and leave both RUNNING, they
log metrics twice after recovery, and they fail when a resumed run repeats a parameter with another value.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from parcelray.config.identity import StoredJob, config_hash
from parcelray.errors import SystemFailure, UserError
from parcelray.loopback import bypass_proxies_on_loopback
from parcelray.tracking.drivers import driver_tag, is_kill, is_other_live_driver, sigterm_as_exit
from parcelray.tracking.lineage import USER_TAG, lineage_tags, user
from parcelray.tracking.store import (
    METRICS_PER_BATCH,
    PARAMS_PER_BATCH,
    ParamValue,
    RunStatus,
    UnsentMetric,
    artifact_location,
    batches,
    clean_key,
    clean_params,
    clean_tags,
    ensure_store,
    explained_store_failures,
    is_unreachable,
    single_attempts,
    store_lock,
)

IDENTITY_TAG = "parcel.identity"
ATTEMPT_TAG = "parcel.attempt"
DRIVER_TAG = "parcel.driver"
PARENT_TAG = "mlflow.parentRunId"
MAX_PENDING = 100_000
"""Largest number of buffered metrics while the store does not answer."""
CLOSE_LIMIT_S = 600.0
"""Longest wait at the end of a run for a store that does not answer, seconds."""
_CLOSE_POLL_S = 2.0
_FLUSH_TIMEOUT_S = 10
_CLOSE_TIMEOUT_S = 60
_RETRY_S = 30.0
"""Interval between two attempts to reach a store that does not answer, while a training continues, seconds."""

logger = logging.getLogger(__name__)


def start_run(
    tracking_uri: str,
    experiment: str,
    run_name: str,
    *,
    params: Mapping[str, ParamValue],
    tags: Mapping[str, str] | None = None,
    parent_run_id: str | None = None,
) -> str:
    """Start the run of an identity, or resume it: one identity under one parent is always the same MLflow run.

    Params are written when the run is created. A resume with another value keeps the first value and records the new
    one in the tag `resume.N.KEY`. Other runs of the identity, and children of the run, that a dead driver left RUNNING
    are set to KILLED.

    Args:
        tracking_uri: as `store.ensure_store` takes or returns it.
        experiment: name of the MLflow experiment; created if missing.
        run_name: the job's identity, `<kind>-<name>-<hash8>`; also the run's name.
        params: flat parameters; secrets are masked.
        tags: further tags, such as `parcel.config_hash`.
        parent_run_id: the run to nest under (pipeline or search -> trial -> evaluation).

    Returns:
        The run id to hand to workers.

    Raises:
        UserError: another live process of this host drives the run, or the experiment was deleted.
    """
    if any(quote in run_name for quote in "'\"`\\"):
        raise UserError(f"Run name {run_name!r} has quotes or backslashes; use letters, digits, '-', '_' and '.'.")
    uri = ensure_store(tracking_uri)
    client = MlflowClient(tracking_uri=uri)
    with store_lock(uri):
        experiment_id = _experiment_id(client, uri, experiment)
        run = _adopt(client, experiment_id, run_name, parent_run_id) or _create(
            client, experiment_id, run_name, parent_run_id
        )
    run_id = str(run.info.run_id)
    _record_params(client, run, params)
    _set_tags(client, run_id, tags or {})
    return run_id


def end_run(tracking_uri: str, run_id: str, status: RunStatus) -> None:
    """End a run; children that are still RUNNING (stopped by a scheduler, lost with their node) become KILLED."""
    client = MlflowClient(tracking_uri=tracking_uri)
    _end(client, client.get_run(run_id), status)


def ended_children(tracking_uri: str, run_id: str) -> frozenset[str]:
    """Names of the child runs of a run that ended by themselves, with status FINISHED or FAILED."""
    client = MlflowClient(tracking_uri=tracking_uri)
    experiment = client.get_run(run_id).info.experiment_id
    names: set[str] = set()
    token = None
    while True:
        page = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{run_id}'", page_token=token)
        names.update(str(run.info.run_name) for run in page if run.info.status in ("FINISHED", "FAILED"))
        token = page.token
        if not token:
            return frozenset(names)


@contextmanager
def tracked_run(
    tracking_uri: str,
    experiment: str,
    run_name: str,
    *,
    params: Mapping[str, ParamValue],
    tags: Mapping[str, str] | None = None,
    parent_run_id: str | None = None,
) -> Iterator[str]:
    """Start or resume a run (see `start_run`) with the tags of its lineage, and end it in every case.

    The status is FINISHED after the block, KILLED on Ctrl-C and SIGTERM, and FAILED on any other exception. Only
    SIGKILL and power loss leave the run RUNNING; the next start of the same identity resumes it.
    """
    with sigterm_as_exit() as was_stopped, explained_store_failures(tracking_uri):
        all_tags = lineage_tags() | dict(tags or {})
        run_id = start_run(
            tracking_uri, experiment, run_name, params=params, tags=all_tags, parent_run_id=parent_run_id
        )
        uri = ensure_store(tracking_uri)
        try:
            yield run_id
        except BaseException as error:
            exited_well = isinstance(error, SystemExit) and not error.code
            end_run(
                uri, run_id, "KILLED" if was_stopped() or is_kill(error) else "FINISHED" if exited_well else "FAILED"
            )
            raise
        end_run(uri, run_id, "FINISHED")


@contextmanager
def job_run(
    job: StoredJob,
    tracking_uri: str | None,
    run_name: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    parent_run_id: str | None = None,
) -> Iterator[str | None]:
    """Start or resume the run of a job for a `with` block, and tag it with the configuration hash and its lineage.

    Args:
        job: the job; its `tracking.experiment` names the experiment.
        tracking_uri: as returned by `store.ensure_store`; None: nothing is recorded and the run id is None.
        run_name: the job's identity, `<kind>-<name>-<hash8>`.
        params: parameters, possibly nested; see `flat_params`.
        tags: further tags.
        parent_run_id: the run to nest under.
    """
    if tracking_uri is None:
        yield None
        return
    with tracked_run(
        tracking_uri,
        job.tracking.experiment,
        run_name,
        params=flat_params(params),
        tags={"parcel.config_hash": config_hash(job)} | dict(tags or {}),
        parent_run_id=parent_run_id,
    ) as run_id:
        yield run_id


def flat_params(values: Mapping[str, Any], prefix: str = "") -> dict[str, ParamValue]:
    """Flatten nested mappings to keys such as `a.b`; lists become text."""
    flat: dict[str, ParamValue] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_params(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool | None) else str(value)
    return flat


class MlflowRunLogger:
    """Writes metrics, tags and files to a run that the driver owns. Metrics are buffered and sent in batches.

    While the store does not answer, metrics stay in the buffer and are sent later.

    Args:
        tracking_uri: as returned by `store.ensure_store`.
        run_id: id of the run.
        flush_every: number of `log_metrics` calls between two batches.
        flush_seconds: longest time that a metric stays in the buffer, in seconds; checked whenever metrics are logged.
    """

    def __init__(self, tracking_uri: str, run_id: str, *, flush_every: int = 50, flush_seconds: float = 10.0) -> None:
        bypass_proxies_on_loopback()
        self._client = MlflowClient(tracking_uri=tracking_uri)
        self._run_id = run_id
        self._flush_every = flush_every
        self._flush_seconds = flush_seconds
        self._last_step: dict[str, int] = {}
        self._knows_stored_steps = False
        self._pending: list[Metric] = []
        self._calls = 0
        self._flushed_at = time.monotonic()
        self._retry_at = 0.0

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at a step (see `MetricLogger`).

        Raises:
            SystemFailure: the store rejects the metrics, or has not answered for so long that the buffer is full.
        """
        timestamp = int(time.time() * 1000)
        self.restore([(clean_key(name), float(value), timestamp, step) for name, value in metrics.items()])
        self._calls += 1
        if self._calls >= self._flush_every or time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def restore(self, unsent: Sequence[UnsentMetric]) -> None:
        """Buffer metrics that an earlier attempt of the run could not send (see `MetricLogger`)."""
        for key, value, timestamp, step in unsent:
            if step > self._last_step.get(key, -1):
                self._last_step[key] = step
                self._pending.append(Metric(key, value, timestamp, step))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; the last value wins."""
        _set_tags(self._client, self._run_id, tags)

    def log_artifact(self, path: Path) -> None:
        """Upload a small file or folder (reports, configs); checkpoints are not uploaded but named by a tag."""
        self._upload(path, None)

    def log_figure_file(self, path: Path) -> None:
        """Upload an image file to the run's folder `figures`."""
        self._upload(path, "figures")

    def flush(self) -> list[UnsentMetric]:
        """Send all buffered metrics, and return those that the store does not have yet (see `MetricLogger`).

        Raises:
            SystemFailure: the store rejects the metrics, or has not answered for so long that the buffer is full.
        """
        if time.monotonic() >= self._retry_at:
            self._try_to_send(_FLUSH_TIMEOUT_S)
        if len(self._pending) > MAX_PENDING:
            raise SystemFailure(
                f"The tracking store has not accepted {len(self._pending):,} metrics of run {self._run_id}. Check that"
                " the store is reachable, then run the same command again to resume."
            )
        return [(metric.key, metric.value, metric.timestamp, metric.step) for metric in self._pending]

    def close(self) -> None:
        """Wait until the store has all metrics. The run itself is ended by the driver.

        Raises:
            SystemFailure: the store rejects the metrics, or has not answered for `CLOSE_LIMIT_S` seconds.
        """
        deadline = time.monotonic() + CLOSE_LIMIT_S
        while not self._try_to_send(_CLOSE_TIMEOUT_S):
            if time.monotonic() > deadline:
                raise SystemFailure(
                    f"The tracking store has not answered for {CLOSE_LIMIT_S / 60:.0f} minutes and does not have"
                    f" {len(self._pending):,} metrics of run {self._run_id}. Check that the store is reachable, then"
                    " run the same command again to resume."
                )
            time.sleep(_CLOSE_POLL_S)

    def _try_to_send(self, timeout_s: int) -> bool:
        """Sends the buffer; returns whether the store has everything."""
        try:
            with single_attempts(timeout_s):
                self._send()
        except MlflowException as error:
            if not is_unreachable(error):
                raise SystemFailure(
                    f"The tracking store rejects the metrics of run {self._run_id}: {error}. Check the run and the"
                    " permissions of the user, then run the same command again to resume."
                ) from error
            if not self._retry_at:
                logger.warning(
                    "The tracking store does not answer; %d metrics are kept and sent later: %s",
                    len(self._pending),
                    error,
                )
            self._retry_at = time.monotonic() + _RETRY_S
            return False
        if self._retry_at:
            logger.warning("The tracking store answers again and has all metrics.")
        self._retry_at = 0.0
        return True

    def _send(self) -> None:
        self._calls = 0
        self._flushed_at = time.monotonic()
        if self._pending and not self._knows_stored_steps:
            # Read with the first batch, so that a worker can start while the store does not answer.
            stored = _last_steps(self._client, self._run_id)
            self._pending = [metric for metric in self._pending if metric.step > stored.get(metric.key, -1)]
            self._last_step = stored | {key: max(step, stored.get(key, -1)) for key, step in self._last_step.items()}
            self._knows_stored_steps = True
        while self._pending:
            # A batch leaves the buffer only when the store has it. If it is sent twice, its timestamps are the same and
            # the store keeps one copy.
            self._client.log_batch(self._run_id, metrics=self._pending[:METRICS_PER_BATCH], synchronous=True)
            del self._pending[:METRICS_PER_BATCH]

    def _upload(self, path: Path, folder: str | None) -> None:
        if not path.exists():
            raise UserError(f"Cannot log {path}: there is no such file or folder.")
        self._client.log_artifact(self._run_id, str(path), artifact_path=folder)


def _last_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    # The store keeps each metric's highest step with the run, so this is one query, however long the history is.
    return {str(metric.key): int(metric.step) for metric in client.get_run(run_id).data.to_proto().metrics}


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location(uri, name)))
        except MlflowException as error:
            experiment = client.get_experiment_by_name(name) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment {name!r} was deleted; restore it (`mlflow experiments restore -x"
            f" {experiment.experiment_id}`) or choose another name (tracking.experiment)."
        )
    return str(experiment.experiment_id)


def _create(client: MlflowClient, experiment_id: str, identity: str, parent_run_id: str | None) -> Run:
    tags = {
        IDENTITY_TAG: identity,
        ATTEMPT_TAG: "1",
        DRIVER_TAG: driver_tag(),
        USER_TAG: user(),
    }
    if parent_run_id is not None:
        tags[PARENT_TAG] = parent_run_id
    return client.create_run(experiment_id, run_name=identity, tags=tags)


def _adopt(client: MlflowClient, experiment_id: str, identity: str, parent_run_id: str | None) -> Run | None:
    """Resume the newest run of an identity, and end other runs that dead drivers left open; None if there is none."""
    candidates = client.search_runs(
        [experiment_id], f"tags.`{IDENTITY_TAG}` = '{identity}'", order_by=["attributes.start_time DESC"]
    )
    runs = [run for run in candidates if run.data.tags.get(PARENT_TAG) == parent_run_id]
    for run in runs:
        if run.info.status == "RUNNING" and is_other_live_driver(run.data.tags.get(DRIVER_TAG, "")):
            host_pid = run.data.tags[DRIVER_TAG].rpartition(":")[0]
            raise UserError(
                f"Run {identity!r} is in progress, driven by the process {host_pid}; wait for it, stop it, or change"
                " the job."
            )
    if not runs:
        return None
    adopted, *others = runs
    for run in others:
        if run.info.status == "RUNNING":
            _end(client, run, "KILLED")
    for child in _running_children(client, adopted):
        if not is_other_live_driver(child.data.tags.get(DRIVER_TAG, "")):
            _end(client, child, "KILLED")
    run_id = adopted.info.run_id
    _set_tags(client, run_id, {ATTEMPT_TAG: str(_attempt(adopted) + 1), DRIVER_TAG: driver_tag()})
    client.update_run(run_id, status="RUNNING")
    return client.get_run(run_id)


def _attempt(run: Run) -> int:
    return int(run.data.tags.get(ATTEMPT_TAG, "1"))


def _running_children(client: MlflowClient, run: Run) -> list[Run]:
    query = f"tags.`{PARENT_TAG}` = '{run.info.run_id}' and attributes.status = 'RUNNING'"
    return list(client.search_runs([run.info.experiment_id], query))


def _end(client: MlflowClient, run: Run, status: RunStatus) -> None:
    for child in _running_children(client, run):
        _end(client, child, "KILLED")
    client.set_terminated(run.info.run_id, status)


def _record_params(client: MlflowClient, run: Run, params: Mapping[str, ParamValue]) -> None:
    cleaned, known = clean_params(params), run.data.params
    for batch in batches([(key, value) for key, value in cleaned.items() if key not in known], PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in batch], synchronous=True)
    # Attempt 2 is the first resume.
    resume = _attempt(run) - 1
    _set_tags(
        client,
        run.info.run_id,
        {f"resume.{resume}.{key}": value for key, value in cleaned.items() if known.get(key, value) != value},
    )


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    for batch in batches(list(clean_tags(tags).items()), PARAMS_PER_BATCH):
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in batch], synchronous=True)
