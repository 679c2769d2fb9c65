"""Runs one training job to a trained, scored and recorded model; called by `parcelray train` and the pipelines."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from parcelray.benchmarks.training_data import check_rows, data_paths
from parcelray.cluster.capacity import DATA_TASK_CPUS, Need, Part, await_capacity
from parcelray.cluster.node_inputs import check_inputs
from parcelray.cluster.session import num_nodes, ray_session
from parcelray.config.data import DataConfig
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.paths import AS_WRITTEN
from parcelray.config.train import TrainJob
from parcelray.console import step_progress
from parcelray.datasets.fingerprint import folder_digest
from parcelray.datasets.source import BadRowsError
from parcelray.errors import SystemFailure
from parcelray.evaluation.predict import PYFUNC_FILE
from parcelray.files import atomic_write
from parcelray.models.adapters import merge_adapters
from parcelray.models.checkpoint import ModelPin, ResolvedCheckpoint, resolve_checkpoint
from parcelray.models.manifest import write_manifest
from parcelray.models.vlm import connector_of, quiet_transformers, write_converted
from parcelray.tracking.lineage import DATA_TAG, MODEL_IN_TAG, MODEL_OUT_TAG, git_commit
from parcelray.tracking.metric_logger import MetricLogger, open_metric_logger
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, job_run
from parcelray.tracking.opening import model_folder
from parcelray.tracking.registry import register_model, resolve_model
from parcelray.tracking.run_folder import BAD_ROWS, IN_PROCESS, RunFolder
from parcelray.tracking.store import check_tracking_uri, ensure_store
from parcelray.training.checkpointing import SHARDS, is_complete, read_state
from parcelray.training.report import report_training
from parcelray.training.start import build_trained
from parcelray.training.train_loop import fit_in_process

MODEL = "model"
"""Folder of the trained model in the run folder."""


@dataclass(frozen=True)
class TrainedRun:
    """A finished training."""

    identity: str
    folder: RunFolder
    metrics: dict[str, float]
    mlflow_run_id: str | None
    was_done: bool
    """Whether the run was already finished, so that nothing was computed."""
    registered: str | None = None
    """`models:/NAME/VERSION` of the trained model; None if the job does not register it."""

    @property
    def model(self) -> str:
        """Folder or URI of the trained checkpoint, with a manifest; every host that reads the storage resolves it."""
        return f"{self.folder.uri}/{MODEL}"

    @property
    def model_folder(self) -> Path:
        """Folder of the trained checkpoint on this host; it is downloaded if this process did not train it.

        Raises:
            SystemFailure: files are missing on the object storage.
        """
        if not (self.folder.local / MODEL).is_dir() and not self.folder.pull(MODEL):
            raise SystemFailure(f"{self.model} is not complete; remove {self.folder.uri}, and train again.")
        return self.folder.local / MODEL


def run_training(
    job: TrainJob,
    console: Console,
    *,
    address: str | None = None,
    parent_run_id: str | None = None,
    report: bool = True,
    wait: bool = True,
    on_report: Callable[[Mapping[str, float]], None] | None = None,
    start_pin: ModelPin | None = None,
) -> TrainedRun:
    """Train a job, or resume it, or return at once if it is finished.

    Args:
        job: the training.
        console: for progress and messages.
        address: Ray cluster; None for RAY_ADDRESS or else a local instance. Unused with `scaling.num_workers: 0`.
        parent_run_id: MLflow run to nest under.
        report: whether to score the model as `job.report` defines.
        wait: whether to wait for the resources of the workers, and to compare the plain paths of the nodes; a search
            does so itself for all of its trials.
        on_report: called with the metrics at each checkpoint; picklable.
        start_pin: what `job.model` was resolved to by a search, whose trials have no access to the registry; None: it
            is resolved here.

    Raises:
        UserError: the job is not valid, its name belongs to another configuration, or the cluster can never hold the
            workers.
        SystemFailure: the training failed more often than `scaling.max_failures`, or its resources were not free within
            `scaling.wait_s`.
    """

    def on_notice(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    folder = RunFolder(job)
    with folder.claimed():
        done = folder.result()
        if done is not None:
            run = TrainedRun(
                folder.identity,
                folder,
                done["metrics"],
                done["mlflow_run_id"],
                was_done=True,
                registered=done.get("registered"),
            )
            console.print(f"{folder.identity} is finished; nothing to do. Its model is in {run.model}.")
            return _registered(job, run, console)
        uri = ensure_store(job.tracking.uri) if job.tracking.uri is not None else None
        start = _opened(job, start_pin) if start_pin is not None else resolve_start(job, uri)
        in_process = job.scaling.bounds[1] == 0
        bad_rows: dict[str, str] = {}
        with _bad_rows_kept(folder, bad_rows), nullcontext() if in_process else ray_session(address):
            if wait and not in_process:
                await_capacity(
                    needed_resources(job),
                    job.scaling.wait_s,
                    "scaling.wait_s",
                    on_notice,
                )
            if wait and not in_process:
                check_inputs([start.pin if start is not None else None], data_paths(job.data))
            bad_rows |= check_rows(job.data)
            if uri is not None and not in_process:
                check_tracking_uri(uri, num_nodes())
            with (
                job_run(
                    job,
                    uri,
                    folder.identity,
                    params=job.model_dump(mode="json", context=AS_WRITTEN),
                    tags={
                        MODEL_IN_TAG: start.pinned if start is not None else "scratch",
                        DATA_TAG: _fingerprint(job.data),
                    },
                    parent_run_id=parent_run_id,
                ) as run_id,
                step_progress(console, job.name, job.training.steps) as on_progress,
            ):
                logger = functools.partial(open_metric_logger, uri, run_id)
                checkpoint, metrics = _fit(job, folder, start, logger, on_progress, on_notice, on_report)
                _keep_bad_rows(folder, bad_rows | read_state(checkpoint).skipped_rows, console)
                _keep_model(job, folder, checkpoint, start)
                if uri is not None and run_id is not None:
                    digest = resolve_checkpoint(folder.local / MODEL).pinned
                    MlflowRunLogger(uri, run_id).set_tags({MODEL_OUT_TAG: digest})
                if report and job.report is not None:
                    metrics |= report_training(job, folder, console, uri, run_id)
                trained = TrainedRun(folder.identity, folder, metrics, run_id, was_done=False)
                trained = _registered(job, trained, console)
        folder.finish({"model": MODEL, "metrics": metrics, "mlflow_run_id": run_id, "registered": trained.registered})
        keep = job.storage_limits.finished_checkpoints
        if keep is not None or not folder.is_local:
            folder.keep_checkpoints(keep or 0)
        return trained


def _registered(job: TrainJob, run: TrainedRun, console: Console) -> TrainedRun:
    """Registers the trained model if the job says so; the same model of the same run is registered once."""
    run_id = run.mlflow_run_id
    if job.register is None or job.tracking.uri is None or run_id is None:
        return run
    if run.registered is None or not run.registered.startswith(f"models:/{job.register}/"):
        uri = ensure_store(job.tracking.uri)
        largest = max(connector_of(run.model_folder).supported_budgets)
        version = register_model(
            uri, run.model_folder, job.register, run_id, pyfunc_file=PYFUNC_FILE, example_budget=largest
        )
        registered = f"models:/{job.register}/{version}"
        run = replace(run, registered=registered)
        MlflowRunLogger(uri, run_id).set_tags({MODEL_OUT_TAG: registered})
    console.print(f"The trained model is {run.registered}")
    return run


def _fingerprint(config: DataConfig) -> str:
    """The data of a training in one line."""
    paths = data_paths(config)
    if not paths:
        return f"{config.type}, defined by the parameters data.*"
    return " ".join([config.type, *map(folder_digest, paths)])


def needed_resources(job: TrainJob) -> Need:
    """Returns the resources that the training of a job needs at least: its workers and one task that reads data."""
    scaling, validation = job.scaling, job.validation
    return Need(
        "The training",
        (
            Part(scaling.bounds[0], "worker", {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}),
            Part(1, "data task", {"CPU": DATA_TASK_CPUS}),
            Part(int(validation.in_background), "validation task", {"GPU": validation.background_gpus}),
        ),
        "lower scaling.num_workers or the resources of each worker",
    )


@contextmanager
def _bad_rows_kept(folder: RunFolder, before: dict[str, str]) -> Iterator[None]:
    """Writes the rows that end a training, and those `before` them, to a file, as the message names only the first."""
    try:
        yield
    except BadRowsError as error:
        _keep_bad_rows(folder, before | error.problems)
        raise


def _keep_bad_rows(folder: RunFolder, rows: Mapping[str, str], console: Console | None = None) -> None:
    """Writes the rows that cannot be used, one JSON object per line with id and reason; none: no file."""
    if not rows:
        return
    path = f"{folder.path}/{BAD_ROWS}"
    lines = "".join(json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in rows.items())
    with atomic_write(path, None if folder.is_local else folder.filesystem) as file:
        file.write(lines.encode())
    if console is not None:
        console.print(f"{len(rows)} rows of the training data were skipped; {path} has their ids and the reasons.")


def resolve_start(job: TrainJob, tracking_uri: str | None) -> ResolvedCheckpoint | None:
    """Resolve the checkpoint that the job starts from; None for a model from scratch."""
    return resolve_model(job.model, tracking_uri) if isinstance(job.model, CheckpointModelConfig) else None


def _opened(job: TrainJob, pin: ModelPin) -> ResolvedCheckpoint:
    assert isinstance(job.model, CheckpointModelConfig)
    return ResolvedCheckpoint(model_folder(pin), job.model.reference, pin)


def _fit(
    job: TrainJob,
    folder: RunFolder,
    start: ResolvedCheckpoint | None,
    logger: Callable[[], MetricLogger],
    on_progress: Callable[[int, str], None],
    on_notice: Callable[[str], None],
    on_report: Callable[[Mapping[str, float]], None] | None,
) -> tuple[Path, dict[str, float]]:
    """Train in this process or on Ray Train; returns the last checkpoint and the last metrics."""
    if job.scaling.bounds[1] == 0:
        _pull_newest(folder)
        return fit_in_process(
            job,
            folder.local / IN_PROCESS,
            checkpoint=start.path if start is not None else None,
            logger=logger(),
            on_progress=on_progress,
            on_notice=on_notice,
            on_report=on_report,
            on_kept=functools.partial(_push_checkpoint, folder, job.checkpointing.keep),
        )
    # Ray Train takes seconds to import, so in-process runs and --dry-run do not load it.
    from parcelray.training.trainer import fit

    pin = start.pin if start is not None else None
    return fit(job, folder, start=pin, logger=logger, on_progress=on_progress, on_notice=on_notice, on_report=on_report)


def _push_checkpoint(folder: RunFolder, keep: int, checkpoint: Path) -> None:
    folder.push(f"{IN_PROCESS}/{checkpoint.name}")
    folder.keep_checkpoints(keep)


def _pull_newest(folder: RunFolder) -> None:
    """Copy the newest complete checkpoint of a training in a process from object storage to this host."""
    if folder.is_local:
        return
    for name in reversed(folder.names(IN_PROCESS)):
        if folder.pull(f"{IN_PROCESS}/{name}") and is_complete(folder.local / IN_PROCESS / name):
            return


def _keep_model(job: TrainJob, folder: RunFolder, checkpoint: Path, start: ResolvedCheckpoint | None) -> None:
    """Write the last checkpoint's model to the run folder, in the data type of the job, with a manifest.

    Shards are joined and adapters merged, so the folder is an ordinary checkpoint. This process holds one copy of the
    model at most.
    """
    target = folder.local / MODEL
    shutil.rmtree(target, ignore_errors=True)
    dtype = getattr(torch, job.checkpointing.model_dtype or "float32")
    if job.training.lora is not None or (checkpoint / SHARDS).is_dir():
        model, processor = build_trained(job, checkpoint, start.path if start is not None else None)
        if job.training.lora is not None:
            merge_adapters(model)
        with quiet_transformers():
            model.to(dtype).save_pretrained(target)
        processor.save_pretrained(target)
    elif job.checkpointing.model_dtype is None:
        shutil.copytree(checkpoint / "model", target)
    else:
        write_converted(checkpoint / "model", target, dtype)
    write_manifest(
        target,
        config=job.model_dump(mode="json", context=AS_WRITTEN),
        git_commit=git_commit(),
        data=job.data.model_dump(mode="json", context=AS_WRITTEN),
        seed=job.seed,
        extra={
            "start": start.pinned if start is not None else "scratch",
            "identity": folder.identity,
            "torch": torch.__version__,
        },
    )
    folder.push(MODEL)
    if job.scaling.bounds[1] != 0:
        shutil.rmtree(checkpoint)
