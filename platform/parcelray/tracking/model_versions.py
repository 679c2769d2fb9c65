"""Registered models, their versions, and the gate results that are stored on each version."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model
from pydantic import TypeAdapter

from parcelray.config.reducer import ReducerConfig
from parcelray.errors import UserError
from parcelray.models.manifest import content_digest, read_manifest, verify_manifest
from parcelray.tracking.mlflow_tracker import IDENTITY_TAG
from parcelray.tracking.registry import CONTENT_TAG, SIGNATURE, aliases_of, check_version, resolve_registry
from parcelray.tracking.store import MAX_TAG, clean_tags

VERDICT_TAG = "parcel.gate"
"""Tag with the verdict: `passed`, `failed`, or `forced` (made champion although a gate failed)."""
BUDGETS_TAG = "parcel.gate_budgets"
"""Tag with a JSON list of the budgets whose answers passed all their checks."""
GATE_REDUCER_TAG = "parcel.gate_reducer"
"""Tag with the reducer that the gates evaluated the version with, as JSON; `null`: none."""
REDUCER_TAG = "parcel.reducer"
"""Tag with the reducer that the version was promoted with, as JSON; the endpoint serves it with this one."""
_REDUCER: TypeAdapter[ReducerConfig | None] = TypeAdapter(ReducerConfig | None)
_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)[@/](?P<version>[^/@]+)")


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: int
    aliases: tuple[str, ...]
    created: str
    """Creation time in UTC, ISO 8601."""
    run_id: str
    """MLflow run that the version was registered under."""
    tags: dict[str, str]

    @property
    def verdict(self) -> str:
        """The verdict of the last promotion; empty before the first."""
        return self.tags.get(VERDICT_TAG, "")

    @property
    def gate_budgets(self) -> tuple[int, ...] | None:
        """Budgets that the last promotion accepted; None before the first."""
        return tuple(json.loads(self.tags[BUDGETS_TAG])) if BUDGETS_TAG in self.tags else None

    @property
    def gate_reducer(self) -> ReducerConfig | None:
        """Reducer that the gates of the last promotion evaluated the version with; None: none."""
        return _REDUCER.validate_json(self.tags.get(GATE_REDUCER_TAG, "null"))

    @property
    def reducer(self) -> ReducerConfig | None:
        """Reducer that the version was last promoted with; None: none."""
        return _REDUCER.validate_json(self.tags.get(REDUCER_TAG, "null"))

    def to_dict(self) -> dict[str, Any]:
        """The version as JSON-serialisable values."""
        return asdict(self) | {"aliases": list(self.aliases)}


def model_names(tracking_uri: str) -> list[str]:
    """Names of the registered models, sorted."""
    client, names, token = MlflowClient(tracking_uri=tracking_uri), [], None
    while True:
        page = client.search_registered_models(page_token=token)
        names += [model.name for model in page]
        token = page.token
        if not token:
            return sorted(names)


def versions_of(tracking_uri: str, name: str) -> list[RegisteredVersion]:
    """All versions of a registered model, newest first.

    Raises:
        UserError: there is no such model.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    by_version: dict[int, list[str]] = {}
    for alias, version in aliases_of(client, name).items():
        by_version.setdefault(version, []).append(alias)
    versions: list[RegisteredVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name='{name}'", page_token=token)
        versions += [_version(each, by_version.get(int(each.version), [])) for each in page]
        token = page.token
        if not token:
            return sorted(versions, key=lambda version: -version.version)


def referenced_version(tracking_uri: str, reference: str) -> RegisteredVersion | None:
    """Find the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names; None: it is another reference.

    Raises:
        UserError: there is no such version.
    """
    parts = _REFERENCE.fullmatch(reference)
    return find_version(tracking_uri, parts["name"], parts["version"]) if parts is not None else None


def find_version(tracking_uri: str, name: str, version_or_alias: str) -> RegisteredVersion:
    """Find one version by its number or alias.

    Raises:
        UserError: there is no such version.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    versions = versions_of(tracking_uri, name)
    if version_or_alias.isdigit():
        check_version(client, name, int(version_or_alias))
    for version in versions:
        if version_or_alias in (str(version.version), *version.aliases):
            return version
    aliases = ", ".join(sorted(alias for version in versions for alias in version.aliases)) or "none"
    raise UserError(
        f"Model {name!r} has no version or alias {version_or_alias!r}; its aliases are: {aliases}, its newest version"
        f" is {versions[0].version}."
    )


def version_of_content(tracking_uri: str, name: str, content: str) -> int | None:
    """The newest version of a model with this content; None if there is no such version or model.

    Args:
        tracking_uri: tracking URI of the registry.
        name: registered model.
        content: digest of the files, as computed by `models.manifest.content_digest`.
    """
    if name not in model_names(tracking_uri):
        return None
    same = (each.version for each in versions_of(tracking_uri, name) if each.tags.get(CONTENT_TAG) == content)
    return next(same, None)


def training_run(tracking_uri: str, folder: Path) -> str | None:
    """The MLflow run that trained a checkpoint, by the identity in its manifest; None if the store has no such run."""
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
    """The gate results that are stored on a version."""

    verdict: str
    """`passed`, `failed` or `forced`."""
    job: str
    """Identity of the promotion job."""
    run_id: str
    """MLflow run of the promotion."""
    user: str
    """User who ran the promotion, and who forced it if it was forced."""
    budgets: Sequence[int]
    """Accepted budgets, see `promotion.gates.accepted_budgets`."""
    failed: Sequence[str]
    """The failed checks, one sentence each."""
    reducer: ReducerConfig | None = None
    """Training-free reducer that the version was evaluated with; None: none."""


def record_verdict(tracking_uri: str, name: str, version: int, record: GateRecord) -> None:
    """Store gate results on a version; they replace earlier ones, which the promotions' MLflow runs keep.

    Args:
        tracking_uri: tracking URI of the registry.
        name: registered model.
        version: version number.
        record: the gate results.
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
        GATE_REDUCER_TAG: _as_tag(record.reducer),
        # Written last, so that a version with a verdict also has the reasons.
        VERDICT_TAG: record.verdict,
    }
    for key, value in clean_tags(tags).items():
        client.set_model_version_tag(name, str(version), key, value)


def record_reducer(tracking_uri: str, name: str, version: int, reducer: ReducerConfig | None) -> None:
    """Store the reducer that a version is promoted with, before its alias moves.

    Args:
        tracking_uri: tracking URI of the registry.
        name: registered model.
        version: version number.
        reducer: the reducer; None: none.
    """
    MlflowClient(tracking_uri=tracking_uri).set_model_version_tag(name, str(version), REDUCER_TAG, _as_tag(reducer))


def _as_tag(reducer: ReducerConfig | None) -> str:
    return "null" if reducer is None else reducer.to_json()


def artifact_problems(tracking_uri: str, name: str, version: int) -> list[str]:
    """Problems with a version's signature, manifest or files, one sentence each; reads every file."""
    try:
        folder, _ = resolve_registry(f"models:/{name}/{version}", tracking_uri)
        verify_manifest(folder)
        digest = content_digest(folder)
    except UserError as error:
        return [str(error)]
    problems = []
    registered = MlflowClient(tracking_uri=tracking_uri).get_model_version(name, str(version))
    if registered.tags.get(CONTENT_TAG) != digest:
        problems.append(f"its files have the digest {digest}, but {registered.tags.get(CONTENT_TAG)} was registered")
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
    # For a remote store, `resolve_registry` downloads only the checkpoint.
    from mlflow.artifacts import download_artifacts

    uri = MlflowClient(tracking_uri=tracking_uri).get_model_version_download_uri(version.name, version.version)
    return Model.load(download_artifacts(artifact_uri=f"{uri}/MLmodel", tracking_uri=tracking_uri)).signature


def _version(version: ModelVersion, aliases: list[str]) -> RegisteredVersion:
    created = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds")
    return RegisteredVersion(
        version.name, int(version.version), tuple(sorted(aliases)), created, version.run_id or "", dict(version.tags)
    )
