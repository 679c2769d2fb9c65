"""Registered models and their versions as people look at them, and the verdict of the gates on each."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model

from parcelray.errors import UserError
from parcelray.models.checkpoint import content_digest, read_manifest, verify_manifest
from parcelray.tracking.mlflow_tracker import IDENTITY_TAG
from parcelray.tracking.registry import CONTENT_TAG, SIGNATURE, aliases_of, check_version, resolve_registry
from parcelray.tracking.store import MAX_TAG, clean_tags

VERDICT_TAG = "parcel.gate"
"""`passed`, `failed`, or `forced`: made champion although a gate failed."""
BUDGETS_TAG = "parcel.gate_budgets"
"""JSON list: the budgets whose answers passed every check that was made of them."""


@dataclass(frozen=True)
class VersionPage:
    """One version of a registered model."""

    name: str
    version: int
    aliases: tuple[str, ...]
    created: str
    """UTC, ISO 8601."""
    run_id: str
    """MLflow run that it comes from."""
    tags: dict[str, str]

    @property
    def verdict(self) -> str:
        """Of the last gate that it was put to; empty before the first."""
        return self.tags.get(VERDICT_TAG, "")

    @property
    def gate_budgets(self) -> tuple[int, ...] | None:
        """Budgets whose answers the last gate accepted; None before the first."""
        return tuple(json.loads(self.tags[BUDGETS_TAG])) if BUDGETS_TAG in self.tags else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__} | {"aliases": list(self.aliases)}


def model_names(tracking_uri: str) -> list[str]:
    """The registered models."""
    client, names, token = MlflowClient(tracking_uri=tracking_uri), [], None
    while True:
        page = client.search_registered_models(page_token=token)
        names += [model.name for model in page]
        token = page.token
        if not token:
            return sorted(names)


def versions_of(tracking_uri: str, name: str) -> list[VersionPage]:
    """All versions of a registered model, the newest first.

    Raises:
        UserError: there is no such model.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    by_version: dict[int, list[str]] = {}
    for alias, version in aliases_of(client, name).items():
        by_version.setdefault(version, []).append(alias)
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name='{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            break
    pages = [_page(each, by_version.get(int(each.version), [])) for each in found]
    return sorted(pages, key=lambda page: -page.version)


def find_version(tracking_uri: str, name: str, version_or_alias: str) -> VersionPage:
    """One version by its number or alias.

    Raises:
        UserError: there is none.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    pages = versions_of(tracking_uri, name)
    if version_or_alias.isdigit():
        check_version(client, name, int(version_or_alias))
    for page in pages:
        if version_or_alias in (str(page.version), *page.aliases):
            return page
    aliases = ", ".join(sorted(alias for page in pages for alias in page.aliases)) or "none"
    raise UserError(
        f"model {name!r} has no version or alias {version_or_alias!r}; its aliases are: {aliases}, its newest version"
        f" is {pages[0].version}."
    )


def version_of_content(tracking_uri: str, name: str, content: str) -> int | None:
    """The newest version of a model that holds these files; None if no version does, or there is no such model.

    Args:
        tracking_uri: of the registry.
        name: registered model.
        content: digest, as `models.checkpoint.content_digest` gives it.
    """
    if name not in model_names(tracking_uri):
        return None
    return next(
        (page.version for page in versions_of(tracking_uri, name) if page.tags.get(CONTENT_TAG) == content), None
    )


def training_run(tracking_uri: str, folder: Path) -> str | None:
    """The MLflow run that trained a checkpoint, by the identity in its manifest; None where the store has none."""
    trained = read_manifest(folder).extra.get("identity")
    if not isinstance(trained, str) or "'" in trained:
        return None
    client = MlflowClient(tracking_uri=tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(
        experiments, f"tags.`{IDENTITY_TAG}` = '{trained}'", max_results=1, order_by=["attributes.start_time DESC"]
    )
    return str(runs[0].info.run_id) if runs else None


class GateRecord(NamedTuple):
    """What the gates said of a version, as the version keeps it."""

    verdict: str
    """`passed`, `failed` or `forced`."""
    job: str
    """Identity of the promotion."""
    run_id: str
    """Its MLflow run."""
    user: str
    """Who ran it, and forced it where it was forced."""
    budgets: Sequence[int]
    """Whose answers were accepted."""
    failed: Sequence[str]
    """What fell short, a sentence each."""


def record_verdict(tracking_uri: str, name: str, version: int, record: GateRecord) -> None:
    """Writes what the gates said onto the version; the last verdict wins, and the run keeps every report.

    Args:
        tracking_uri: of the registry.
        name: registered model.
        version: its number.
        record: what they said.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    sentences = json.dumps(list(record.failed))
    if len(sentences) > MAX_TAG:
        sentences = json.dumps([f"{len(record.failed)} checks; the first: {record.failed[0][:1000]}"])
    tags = {
        "parcel.gate_job": record.job,
        "parcel.gate_time": datetime.now(UTC).isoformat(timespec="seconds"),
        "parcel.gate_run": record.run_id,
        "parcel.gate_user": record.user,
        "parcel.gate_failed": sentences,
        BUDGETS_TAG: json.dumps(list(record.budgets)),
        # Last: a version that carries it carries its reasons, too.
        VERDICT_TAG: record.verdict,
    }
    for key, value in clean_tags(tags).items():
        client.set_model_version_tag(name, str(version), key, value)


def card_problems(tracking_uri: str, name: str, version: int) -> list[str]:
    """What is wrong with a version's files: signature, manifest, digest; each file is read and compared."""
    try:
        folder, _ = resolve_registry(f"models:/{name}/{version}", tracking_uri)
        verify_manifest(folder)
        digest = content_digest(folder)
    except UserError as error:
        return [str(error)]
    problems = []
    registered = MlflowClient(tracking_uri=tracking_uri).get_model_version(name, str(version))
    if registered.tags.get(CONTENT_TAG) != digest:
        problems.append(f"its files are {digest}, but {registered.tags.get(CONTENT_TAG)} was registered")
    signature = _signature(registered, tracking_uri, folder)
    if signature != SIGNATURE:
        problems.append(
            f"its signature is {signature}, not that of an elastic model (prompt, image, num_visual_tokens -> answer)"
        )
    return problems


def _signature(version: ModelVersion, tracking_uri: str, folder: Path) -> Any:
    wrapper = folder.parent.parent
    if (wrapper / "MLmodel").is_file():
        return Model.load(str(wrapper)).signature
    # Of a remote store only the checkpoint is kept here.
    from mlflow.artifacts import download_artifacts

    uri = MlflowClient(tracking_uri=tracking_uri).get_model_version_download_uri(version.name, version.version)
    return Model.load(download_artifacts(artifact_uri=f"{uri}/MLmodel", tracking_uri=tracking_uri)).signature


def _page(version: ModelVersion, aliases: list[str]) -> VersionPage:
    created = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds")
    return VersionPage(
        version.name, int(version.version), tuple(sorted(aliases)), created, version.run_id or "", dict(version.tags)
    )
