"""Runs one promotion job: evaluates the candidate against the gates and, if it passes, makes it the champion."""

import getpass
import hashlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.identity import identity
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.paths import AS_WRITTEN
from parcelray.config.promote import PromoteJob
from parcelray.config.reducer import ReducerConfig
from parcelray.errors import UserError
from parcelray.evaluation.plan import EvaluationPlan, evaluation_plan
from parcelray.evaluation.predict import PYFUNC_FILE
from parcelray.evaluation.run import run_evaluation
from parcelray.files import open_storage, write_json
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.promotion.gates import Check, accepted_budgets, check_golden, check_regression, check_retention
from parcelray.promotion.latency import check_latency
from parcelray.tracking.lineage import MODEL_IN_TAG, submitted_job
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, job_run
from parcelray.tracking.model_versions import (
    GateRecord,
    artifact_problems,
    find_version,
    model_names,
    record_reducer,
    record_verdict,
    training_run,
    version_of_content,
    versions_of,
)
from parcelray.tracking.registry import CHALLENGER, CHAMPION, promote, register_model, resolve_model
from parcelray.tracking.store import ensure_store


class GateRefusal(UserError):
    """A candidate failed a gate; the message names every failed check.

    Args:
        version: `models:/NAME/VERSION`.
        failed: the failed checks, one sentence each.
        intact: whether the version's files are those that were registered; only such a version can be forced.
    """

    def __init__(self, version: str, failed: Sequence[str], *, intact: bool = True) -> None:
        self.version = version
        self.failed = tuple(failed)
        self.intact = intact
        remedy = (
            "Train a better version, or change the gate; --force promotes it anyway, and records this."
            if intact
            else "Register the checkpoint again; --force does not promote files that differ from the registered ones."
        )
        super().__init__(f"{version} is not promoted: {'; '.join(failed)}. {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (partial(type(self), intact=self.intact), (self.version, self.failed))


@dataclass(frozen=True)
class Verdict:
    """The gate results of a version."""

    model: str
    version: int
    champion: int | None
    """Version of the champion when the gates ran; None if there was none."""
    checks: tuple[Check, ...]
    budgets: tuple[int, ...]
    """Budgets whose answers passed all their checks; under load, an endpoint may reduce the budget to these."""
    force: bool
    """Whether the version is promoted even if a gate fails."""
    user: str
    """User who ran the promotion."""
    mlflow_run_id: str
    reducer: ReducerConfig | None = None
    """Training-free reducer that the version was evaluated with; None: none."""

    @property
    def failed(self) -> list[str]:
        """The failed checks, one sentence each."""
        return [str(check) for check in self.checks if not check.passed]

    @property
    def word(self) -> str:
        """`passed`, `failed` or `forced`."""
        return "passed" if not self.failed else "forced" if self.force and self.intact else "failed"

    @property
    def intact(self) -> bool:
        """Whether the version's files are those that were registered."""
        return all(check.passed for check in self.checks if check.gate == "artifacts")

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON-serialisable values."""
        return {
            "model": self.model,
            "version": self.version,
            "reducer": None if self.reducer is None else self.reducer.model_dump(mode="json"),
            "champion_before": self.champion,
            "verdict": self.word,
            "accepted_budgets": list(self.budgets),
            "user": self.user,
            "checks": [check.to_dict() for check in self.checks],
            "mlflow_run_id": self.mlflow_run_id,
        }

    def to_rich(self) -> Table:
        """The checks as a table for the console."""
        title = f"models:/{self.model}/{self.version}: {self.word}"
        table = Table("gate", "check", "measured", "required", "result", title=title)
        for check in self.checks:
            result = "passed" if check.passed else "FAILED"
            table.add_row(check.gate, check.what, check.measured, check.required, result)
        return table


def run_promotion(job: PromoteJob, console: Console, *, force: bool = False, address: str | None = None) -> Verdict:
    """Evaluate the candidate against the promotion gates and, on success, move the `champion` alias to it.

    The former champion gets the alias `previous`. Stored predictions are reused, so checking the same version against
    another gate takes little time.

    Args:
        job: the promotion.
        console: for progress and the table.
        force: promote the candidate even if a gate fails; this is recorded with the user's name. Files that differ from
            the registered ones are never promoted.
        address: Ray cluster; None for RAY_ADDRESS or else a local instance. Unused with `compute.actors: 0`.

    Raises:
        GateRefusal: the candidate failed a gate.
        UserError: there is no such candidate, the job is not valid, or the champion changed while the gates ran.
    """
    assert job.tracking.uri is not None
    uri = ensure_store(job.tracking.uri)
    user = submitted_job().get("user") or getpass.getuser()
    tags = {"parcel.gate_user": user, "parcel.gate_force": str(force)}
    params = job.model_dump(mode="json", exclude={"benchmarks"}, context=AS_WRITTEN)
    name = identity(_pinned(job, uri))
    with job_run(job, uri, name, params=params, tags=tags) as run_id:
        assert run_id is not None
        version = _candidate(job, uri, run_id)
        champion = _champion(uri, job.model)
        console.print(
            f"Candidate: models:/{job.model}/{version}; champion:"
            f" {f'version {champion}' if champion is not None else 'none yet'}",
        )
        checks = tuple(_checks(job, uri, version, champion, console, address, run_id))
        verdict = Verdict(
            job.model,
            version,
            champion,
            checks,
            tuple(accepted_budgets(checks, job.budgets)),
            force,
            user,
            run_id,
            job.reducer,
        )
        _record(job, name, uri, verdict)
        if verdict.word != "failed":
            record_reducer(uri, job.model, version, job.reducer)
            promote(uri, job.model, version, expected=champion)
    console.print(verdict.to_rich())
    if verdict.word == "failed":
        raise GateRefusal(f"models:/{job.model}/{version}", verdict.failed, intact=verdict.intact)
    console.print(f"models:/{job.model}@{CHAMPION} is version {version}")
    return verdict


def promotion_plan(job: PromoteJob) -> EvaluationPlan:
    """Plan the candidate's evaluation for --dry-run, with its cost if no prediction is stored; registers nothing.

    Raises:
        UserError: there is no such candidate, or the job is not valid.
    """
    assert job.tracking.uri is not None
    uri = ensure_store(job.tracking.uri)
    if _is_checkpoint(job.candidate):
        return evaluation_plan(job.evaluation(f"gate-{job.name}-new", job.candidate, job.reducer))
    version = find_version(uri, job.model, job.candidate).version
    return evaluation_plan(_evaluation(job, version, job.reducer))


def _evaluation(job: PromoteJob, version: int, reducer: ReducerConfig | None) -> EvaluateJob:
    """The evaluation of one version with one reducer, under a name of its own."""
    suffix = "" if reducer is None else f"-{hashlib.sha256(reducer.to_json().encode()).hexdigest()[:6]}"
    return job.evaluation(f"gate-{job.name}-v{version}{suffix}", f"models:/{job.model}/{version}", reducer)


def _pinned(job: PromoteJob, uri: str) -> PromoteJob:
    """The job with its candidate pinned to a version, so that a moved alias gives another run identity."""
    pinned = (
        resolve_checkpoint(job.candidate).pinned
        if _is_checkpoint(job.candidate)
        else str(find_version(uri, job.model, job.candidate).version)
    )
    return job.model_copy(update={"candidate": pinned})


def _candidate(job: PromoteJob, uri: str, run_id: str) -> int:
    """The candidate's version number; a checkpoint that has no version yet is registered first.

    The new version belongs to the MLflow run that trained the checkpoint if the store has it, else to this promotion's.
    """
    if _is_checkpoint(job.candidate):
        checkpoint = resolve_checkpoint(job.candidate)
        folder, version = checkpoint.path, version_of_content(uri, job.model, checkpoint.pin.digest)
        if version is None:
            version = register_model(
                uri,
                folder,
                job.model,
                training_run(uri, folder) or run_id,
                pyfunc_file=PYFUNC_FILE,
                example_budget=job.budgets[0],
            )
        promote(uri, job.model, version, alias=CHALLENGER)
        return version
    return find_version(uri, job.model, job.candidate).version


def _is_checkpoint(candidate: str) -> bool:
    """Whether a candidate is a checkpoint, in a folder or at a URI, and not a version or an alias."""
    return "://" in candidate or Path(candidate).is_dir()


def _champion(uri: str, name: str) -> int | None:
    if name not in model_names(uri):
        return None
    return next((each.version for each in versions_of(uri, name) if CHAMPION in each.aliases), None)


def _checks(
    job: PromoteJob, uri: str, version: int, champion: int | None, console: Console, address: str | None, run_id: str
) -> Iterator[Check]:
    gates = job.gates
    problems = artifact_problems(uri, job.model, version)
    yield Check(
        gate="artifacts",
        what="signature, manifest and files",
        measured="; ".join(problems) or "valid",
        required="the registered content, as safetensors",
        passed=not problems,
    )
    if problems:
        # No file of a version that differs from what was registered is loaded.
        return
    ours = f"models:/{job.model}/{version}"
    own = run_evaluation(
        _evaluation(job, version, job.reducer), console, address=address, parent_run_id=run_id, tables=False
    ).summary
    if gates.retention is not None:
        yield from check_retention(own, gates.retention)
    if gates.regression is not None:
        served = find_version(uri, job.model, str(champion)).reducer if champion is not None else None
        if champion is None or (champion == version and served == job.reducer):
            yield Check(
                gate="regression",
                what="the champion to compare with",
                measured="none yet" if champion is None else "this version",
                required="no loss against it",
                passed=True,
            )
        else:
            # The champion is what the endpoint serves now: with the reducer that it was promoted with.
            other = _evaluation(job, champion, served)
            theirs = run_evaluation(other, console, address=address, parent_run_id=run_id, tables=False).summary
            yield from check_regression(own, theirs, gates.regression)
    yield from check_golden(own.splits, gates.golden)
    if gates.latency is not None:
        yield from check_latency(job, gates.latency, resolve_model(CheckpointModelConfig(reference=ours), uri))


def _record(job: PromoteJob, name: str, uri: str, verdict: Verdict) -> None:
    record = GateRecord(
        verdict.word, name, verdict.mlflow_run_id, verdict.user, verdict.budgets, verdict.failed, verdict.reducer
    )
    record_verdict(uri, verdict.model, verdict.version, record)
    filesystem, root = open_storage(job.storage)
    folder = f"{root}/promote/{job.name}/{verdict.mlflow_run_id}"
    # The same promotion against another champion is the same MLflow run, so each verdict gets a new file.
    numbers = itertools.count(1)
    paths = (f"{folder}/verdict-v{verdict.version}-{number}.json" for number in numbers)
    path = next(path for path in paths if not filesystem.exists(path))
    write_json(path, verdict.to_dict(), filesystem)
    tracker = MlflowRunLogger(uri, verdict.mlflow_run_id)
    tracker.set_tags({"parcel.gate": verdict.word, MODEL_IN_TAG: f"models:/{verdict.model}/{verdict.version}"})
    with tempfile.TemporaryDirectory() as temporary:
        filesystem.get_file(path, f"{temporary}/{Path(path).name}")
        tracker.log_artifact(Path(temporary) / Path(path).name)
    tracker.close()
