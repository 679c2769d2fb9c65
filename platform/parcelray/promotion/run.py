"""A promotion from its job file to the verdict: the candidate is put to the gates, and only what passes them becomes the champion."""

import getpass
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parcelray.config.identity import config_hash, identity
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.promote import PromoteJob
from parcelray.errors import UserError
from parcelray.evaluation.plan import EvaluationPlan, evaluation_plan
from parcelray.evaluation.predict import PYFUNC_FILE
from parcelray.evaluation.run import run_evaluation
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.promotion.gates import Check, accepted_budgets, check_golden, check_regression, check_retention
from parcelray.promotion.latency import check_latency
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, tracked_run
from parcelray.tracking.model_versions import (
    GateRecord,
    card_problems,
    find_version,
    model_names,
    record_verdict,
    training_run,
    version_of_content,
    versions_of,
)
from parcelray.tracking.provenance import flat_params, git_commit, resolve_model
from parcelray.tracking.registry import CHALLENGER, CHAMPION, promote, register_model
from parcelray.tracking.store import ensure_store


class GateRefusal(UserError):
    """A candidate that fell short of a gate; the message has every number that did.

    Args:
        version: `models:/NAME/VERSION`.
        failed: what fell short, a sentence each.
        sound: whether its files are what was registered; only such a version can be forced.
    """

    def __init__(self, version: str, failed: Sequence[str], *, sound: bool = True) -> None:
        self.version = version
        self.failed = tuple(failed)
        self.sound = sound
        remedy = (
            "Train a better version, or change the gate; --force promotes it all the same, and records it."
            if sound
            else "Register the checkpoint again; --force does not promote files that are not what was registered."
        )
        super().__init__(f"{version} is not promoted: {'; '.join(failed)}. {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (partial(type(self), sound=self.sound), (self.version, self.failed))


@dataclass(frozen=True)
class Verdict:
    """What the gates said of a version."""

    model: str
    version: int
    champion: int | None
    """The champion when the gates ran; None: there was none."""
    checks: tuple[Check, ...]
    budgets: tuple[int, ...]
    """Whose answers passed every check that was made of them: an endpoint may go down to these under load."""
    force: bool
    """Whether it was to become the champion whatever the gates say of its answers."""
    user: str
    """Who ran the promotion."""
    mlflow_run_id: str

    @property
    def failed(self) -> list[str]:
        """What fell short, a sentence each."""
        return [str(check) for check in self.checks if not check.passed]

    @property
    def word(self) -> str:
        """`passed`, `failed` or `forced`."""
        return "passed" if not self.failed else "forced" if self.force and self.sound else "failed"

    @property
    def sound(self) -> bool:
        """Whether its files are what was registered."""
        return all(check.passed for check in self.checks if check.gate == "card")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "model": self.model,
            "version": self.version,
            "champion_before": self.champion,
            "verdict": self.word,
            "accepted_budgets": list(self.budgets),
            "user": self.user,
            "checks": [check.to_dict() for check in self.checks],
            "mlflow_run_id": self.mlflow_run_id,
        }

    def to_rich(self) -> Table:
        """For the console."""
        table = Table("gate", "what", "found", "asked", "", title=f"models:/{self.model}/{self.version}: {self.word}")
        for check in self.checks:
            table.add_row(check.gate, check.what, check.found, check.asked, "passed" if check.passed else "FAILED")
        return table


def run_promotion(job: PromoteJob, console: Console, *, force: bool = False, address: str | None = None) -> Verdict:
    """Puts the candidate to the gates and, if it passes them, makes it the champion; the former one becomes `previous`.

    Answers that are stored are not computed again, so another gate on the same version costs next to nothing.

    Args:
        job: the promotion.
        console: for progress and the table.
        force: promote whatever the gates say of the answers; that is recorded with who did it. Files that are not what
            was registered are never promoted.
        address: Ray cluster; None: RAY_ADDRESS, else a local instance. Unused with `compute.actors: 0`.

    Raises:
        GateRefusal: the candidate fell short.
        UserError: there is no such candidate, the job cannot run as it is written, or another champion was made while
            the gates ran.
    """
    assert job.tracking.uri is not None
    uri = ensure_store(job.tracking.uri)
    user = getpass.getuser()
    tags = {"parcel.config_hash": config_hash(job), "parcel.gate_user": user, "parcel.gate_force": str(force)}
    commit = git_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    params = flat_params(job.model_dump(mode="json", exclude={"benchmarks"}))
    name = identity(_pinned(job, uri))
    with tracked_run(uri, job.tracking.experiment, name, params=params, tags=tags) as run_id:
        version = _candidate(job, uri, run_id)
        champion = _champion(uri, job.model)
        console.print(
            f"Candidate models:/{job.model}/{version}, champion"
            f" {f'version {champion}' if champion is not None else 'none yet'}",
            highlight=False,
        )
        checks = tuple(_checks(job, uri, version, champion, console, address, run_id))
        verdict = Verdict(
            job.model, version, champion, checks, tuple(accepted_budgets(checks, job.budgets)), force, user, run_id
        )
        _record(job, name, uri, verdict)
        if verdict.word != "failed":
            promote(uri, job.model, version, expected=champion)
    console.print(verdict.to_rich())
    if verdict.word == "failed":
        raise GateRefusal(f"models:/{job.model}/{version}", verdict.failed, sound=verdict.sound)
    console.print(f"models:/{job.model}@{CHAMPION} is version {version}", highlight=False)
    return verdict


def promotion_plan(job: PromoteJob) -> EvaluationPlan:
    """What the candidate would be asked, and what that costs where no answer is stored yet; registers nothing.

    Raises:
        UserError: there is no such candidate, or the job cannot run as it is written.
    """
    assert job.tracking.uri is not None
    uri = ensure_store(job.tracking.uri)
    if Path(job.candidate).is_dir():
        return evaluation_plan(job.evaluation(f"gate-{job.name}-new", job.candidate))
    version = find_version(uri, job.model, job.candidate).version
    return evaluation_plan(job.evaluation(f"gate-{job.name}-v{version}", f"models:/{job.model}/{version}"))


def _pinned(job: PromoteJob, uri: str) -> PromoteJob:
    """The job with its candidate pinned: an alias that moved is another promotion."""
    folder = Path(job.candidate)
    pinned = (
        resolve_checkpoint(folder).pinned
        if folder.is_dir()
        else str(find_version(uri, job.model, job.candidate).version)
    )
    return job.model_copy(update={"candidate": pinned})


def _candidate(job: PromoteJob, uri: str, run_id: str) -> int:
    """The candidate's version; a folder that is no version yet is registered first, under the run that trained it where the store has it."""
    folder = Path(job.candidate)
    if folder.is_dir():
        version = version_of_content(uri, job.model, resolve_checkpoint(folder).pinned)
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


def _champion(uri: str, name: str) -> int | None:
    if name not in model_names(uri):
        return None
    return next((page.version for page in versions_of(uri, name) if CHAMPION in page.aliases), None)


def _checks(
    job: PromoteJob, uri: str, version: int, champion: int | None, console: Console, address: str | None, run_id: str
) -> Iterator[Check]:
    gates = job.gates
    problems = card_problems(uri, job.model, version)
    yield Check(
        "card",
        "signature, manifest and files",
        "; ".join(problems) or "in order",
        "what was registered, as safetensors",
        not problems,
    )
    if problems:
        # Nothing of a version whose files are not what they should be is loaded.
        return
    ours = f"models:/{job.model}/{version}"
    own = run_evaluation(
        job.evaluation(f"gate-{job.name}-v{version}", ours),
        console,
        address=address,
        parent_run_id=run_id,
        tables=False,
    ).summary
    if gates.retention is not None:
        yield from check_retention(own, gates.retention)
    if gates.regression is not None:
        if champion is None or champion == version:
            found = "none yet" if champion is None else "this version"
            yield Check("regression", "the champion to compare with", found, "no loss against it", True)
        else:
            other = job.evaluation(f"gate-{job.name}-v{champion}", f"models:/{job.model}/{champion}")
            theirs = run_evaluation(other, console, address=address, parent_run_id=run_id, tables=False).summary
            yield from check_regression(own, theirs, gates.regression)
    yield from check_golden(own.splits, gates.golden)
    if gates.latency is not None:
        yield from check_latency(job, gates.latency, resolve_model(CheckpointModelConfig(reference=ours), uri))


def _record(job: PromoteJob, name: str, uri: str, verdict: Verdict) -> None:
    record = GateRecord(verdict.word, name, verdict.mlflow_run_id, verdict.user, verdict.budgets, verdict.failed)
    record_verdict(uri, verdict.model, verdict.version, record)
    folder = Path(job.storage) / "promote" / job.name / verdict.mlflow_run_id
    folder.mkdir(parents=True, exist_ok=True)
    # The same promotion against another champion is the same run: each verdict has a file of its own.
    numbers = itertools.count(1)
    path = next(
        path for number in numbers if not (path := folder / f"verdict-v{verdict.version}-{number}.json").exists()
    )
    path.write_text(json.dumps(verdict.to_dict(), indent=2) + "\n", encoding="utf-8")
    tracker = MlflowRunLogger(uri, verdict.mlflow_run_id)
    tracker.set_tags({"parcel.gate": verdict.word, "parcel.model": f"models:/{verdict.model}/{verdict.version}"})
    tracker.log_artifact(path)
    tracker.close()
