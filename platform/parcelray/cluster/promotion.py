"""A promotion from its job file to the verdict: the candidate is put to the gates, and only what passes them becomes the champion."""

import getpass
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from parcelray.cluster.evaluation_plan import EvaluationPlan, evaluation_plan
from parcelray.cluster.evaluation_run import run_evaluation
from parcelray.cluster.evaluation_setup import prepare
from parcelray.cluster.provenance import flat_params, git_commit, resolve_model
from parcelray.config.loader import config_hash, identity
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.promote import LatencyGate, PromoteJob
from parcelray.data.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.gates import Check, check_golden, check_regression, check_retention
from parcelray.evaluation.predictor import Predictor
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.processor import image_size_of, load_processor
from parcelray.models.vlm import load_vlm, use_sdpa_where_exact
from parcelray.profiling.answer_latency import answer_p95_ms
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, tracked_run
from parcelray.tracking.model_versions import card_problems, find_version, model_names, record_verdict, training_run, version_of_content, versions_of
from parcelray.tracking.registry import CHALLENGER, CHAMPION, promote, register_model
from parcelray.tracking.store import ensure_store


class GateRefusal(UserError):
    """A candidate that fell short of a gate; the message has every number that did.

    Args:
        version: `models:/NAME/VERSION`.
        failed: what fell short, a sentence each.
    """

    def __init__(self, version: str, failed: Sequence[str]) -> None:
        self.version = version
        self.failed = tuple(failed)
        super().__init__(
            f"{version} is not promoted: {'; '.join(failed)}. Train a better version, or change the gate; --force promotes it all the same, and records it."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.version, self.failed))


@dataclass(frozen=True)
class Verdict:
    """What the gates said of a version."""

    model: str
    version: int
    champion: int | None
    """The champion when the gates ran; None: there was none."""
    checks: tuple[Check, ...]
    forced: bool
    """Whether it became the champion although a check failed."""
    mlflow_run_id: str

    @property
    def failed(self) -> list[str]:
        """What fell short, a sentence each."""
        return [str(check) for check in self.checks if not check.passed]

    @property
    def word(self) -> str:
        """`passed`, `failed` or `forced`."""
        return "passed" if not self.failed else "forced" if self.forced else "failed"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "model": self.model,
            "version": self.version,
            "champion_before": self.champion,
            "verdict": self.word,
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
        force: promote whatever the gates say; that is recorded with who did it.
        address: Ray cluster; None: RAY_ADDRESS, else a local instance. Unused with `compute.actors: 0`.

    Raises:
        GateRefusal: the candidate fell short.
        UserError: there is no such candidate, or the job cannot run as it is written.
    """
    assert job.tracking.uri is not None
    uri = ensure_store(job.tracking.uri)
    tags = {"parcel.config_hash": config_hash(job), "parcel.gate_user": getpass.getuser(), "parcel.gate_force": str(force)}
    commit = git_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    params = flat_params(job.model_dump(mode="json", exclude={"benchmarks"}))
    name = identity(_pinned(job, uri))
    with tracked_run(uri, job.tracking.experiment, name, params=params, tags=tags) as run_id:
        version = _candidate(job, uri, run_id)
        champion = _champion(uri, job.model)
        console.print(f"Candidate models:/{job.model}/{version}, champion {f'version {champion}' if champion is not None else 'none yet'}", highlight=False)
        checks = tuple(_checks(job, uri, version, champion, console, address, run_id))
        verdict = Verdict(job.model, version, champion, checks, forced=force, mlflow_run_id=run_id)
        _record(job, name, uri, verdict)
        if verdict.word != "failed":
            promote(uri, job.model, version)
    console.print(verdict.to_rich())
    if verdict.word == "failed":
        raise GateRefusal(f"models:/{job.model}/{version}", verdict.failed)
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
    pinned = resolve_checkpoint(folder).pinned if folder.is_dir() else str(find_version(uri, job.model, job.candidate).version)
    return job.model_copy(update={"candidate": pinned})


def _candidate(job: PromoteJob, uri: str, run_id: str) -> int:
    """The candidate's version; a folder that is no version yet is registered first, under the run that trained it where the store has it."""
    folder = Path(job.candidate)
    if folder.is_dir():
        version = version_of_content(uri, job.model, resolve_checkpoint(folder).pinned)
        if version is None:
            version = register_model(uri, folder, job.model, training_run(uri, folder) or run_id, example_budget=job.budgets[0])
        promote(uri, job.model, version, alias=CHALLENGER)
        return version
    return find_version(uri, job.model, job.candidate).version


def _champion(uri: str, name: str) -> int | None:
    if name not in model_names(uri):
        return None
    return next((page.version for page in versions_of(uri, name) if CHAMPION in page.aliases), None)


def _checks(job: PromoteJob, uri: str, version: int, champion: int | None, console: Console, address: str | None, run_id: str) -> Iterator[Check]:
    gates = job.gates
    problems = card_problems(uri, job.model, version)
    yield Check("card", "signature, manifest and files", "; ".join(problems) or "in order", "what was registered, as safetensors", not problems)
    if problems:
        # Nothing of a version whose files are not what they should be is loaded.
        return
    ours = f"models:/{job.model}/{version}"
    own = run_evaluation(job.evaluation(f"gate-{job.name}-v{version}", ours), console, address=address, parent_run_id=run_id, tables=False).summary
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
        yield from _latency(job, gates.latency, ours, uri)


def _latency(job: PromoteJob, gate: LatencyGate, reference: str, uri: str) -> Iterator[Check]:
    checkpoint = resolve_model(CheckpointModelConfig(reference=reference), uri)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_vlm(checkpoint.path).eval().to(device)
    use_sdpa_where_exact(model)
    first = prepare(job.evaluation("latency", reference), image_size_of(checkpoint.path))[0]
    samples: list[Sample] = []
    for row in first.task.rows:
        samples += first.task.reader.read(row).samples
        if len(samples) >= gate.questions:
            break
    predictor = Predictor(model, load_processor(checkpoint.path), batch_size=1, settings=first.task.generation, device=device)
    for budget, found in answer_p95_ms(predictor, samples[: gate.questions], list(gate.at_most_ms)).items():
        most = gate.at_most_ms[budget]
        yield Check("latency", f"p95 of one question at {budget} visual tokens", f"{found:.1f} ms", f"at most {most:g} ms", found <= most)


def _record(job: PromoteJob, name: str, uri: str, verdict: Verdict) -> None:
    record_verdict(uri, verdict.model, verdict.version, verdict.word, job=name, run_id=verdict.mlflow_run_id, failed=verdict.failed)
    folder = Path(job.storage) / "promote" / job.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"verdict-v{verdict.version}.json"
    path.write_text(json.dumps(verdict.to_dict(), indent=2) + "\n", encoding="utf-8")
    tracker = MlflowRunLogger(uri, verdict.mlflow_run_id)
    tracker.set_tags({"parcel.gate": verdict.word, "parcel.model": f"models:/{verdict.model}/{verdict.version}"})
    tracker.log_artifact(path)
    tracker.close()
