"""`parcelray models list|show|rollback`: the registered models and their versions, as tables and JSON."""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from parcelray.config.train import TrackingConfig
from parcelray.console import key_value_table
from parcelray.errors import UserError
from parcelray.tracking.model_versions import RegisteredVersion, find_version, model_names, versions_of
from parcelray.tracking.registry import CHAMPION, CONTENT_TAG, PREVIOUS, rollback
from parcelray.tracking.store import ensure_store


@dataclass(frozen=True)
class ModelList:
    """The registered models, each with its versions, newest first."""

    models: dict[str, list[RegisteredVersion]]

    def to_dict(self) -> dict[str, Any]:
        """The list as JSON-serialisable values."""
        return {
            "models": [
                {"name": name, "versions": len(versions), "aliases": _aliases(versions)}
                for name, versions in self.models.items()
            ]
        }

    def to_rich(self) -> Table:
        """The list as a table for the console."""
        table = Table("model", "versions", "newest", "aliases")
        for name, versions in self.models.items():
            aliases = ", ".join(f"{alias}: {version}" for alias, version in _aliases(versions).items())
            table.add_row(name, str(len(versions)), versions[0].created if versions else "-", aliases or "-")
        return table


@dataclass(frozen=True)
class ModelVersions:
    """Versions of one registered model."""

    name: str
    versions: list[RegisteredVersion]
    detailed: bool
    """Whether the table shows all properties of the only version, instead of one row per version."""

    def to_dict(self) -> dict[str, Any]:
        """The versions as JSON-serialisable values."""
        return {"name": self.name, "versions": [version.to_dict() for version in self.versions]}

    def to_rich(self) -> Table:
        """The versions as a table for the console."""
        if self.detailed:
            (version,) = self.versions
            rows = {
                "aliases": ", ".join(version.aliases) or "-",
                "created": version.created,
                "MLflow run": version.run_id,
                **version.tags,
            }
            title = f"models:/{self.name}/{version.version}"
            return key_value_table(rows, header=("property", "value"), title=title)
        table = Table("version", "aliases", "created", "gates", "content", title=self.name)
        for version in self.versions:
            content = version.tags.get(CONTENT_TAG, "-")[:19]
            table.add_row(
                str(version.version), ", ".join(version.aliases), version.created, version.verdict or "-", content
            )
        return table


def list_models(tracking_uri: str | None) -> ModelList:
    """List all registered models.

    Args:
        tracking_uri: tracking URI of the registry; None for the default of jobs.
    """
    uri = _store(tracking_uri)
    return ModelList({name: versions_of(uri, name) for name in model_names(uri)})


def show_model(name: str, version: str | None, tracking_uri: str | None) -> ModelVersions:
    """Find all versions of a model, or one version by number or alias.

    Raises:
        UserError: there is no such model or version.
    """
    uri = _store(tracking_uri)
    if version is None:
        return ModelVersions(name, versions_of(uri, name), detailed=False)
    return ModelVersions(name, [find_version(uri, name, version)], detailed=True)


def roll_back(name: str, tracking_uri: str | None) -> ModelVersions:
    """Make the previous champion the champion again; returns the versions with the aliases champion and previous.

    Raises:
        UserError: there was no champion before this one.
    """
    uri = _store(tracking_uri)
    rollback(uri, name)
    exchanged = [version for version in versions_of(uri, name) if {CHAMPION, PREVIOUS} & set(version.aliases)]
    return ModelVersions(name, exchanged, detailed=False)


def _store(tracking_uri: str | None) -> str:
    uri = TrackingConfig().uri if tracking_uri is None else tracking_uri
    if uri in (None, "none"):
        raise UserError("The registry needs a tracking store; set a tracking URI such as sqlite:///runs/mlflow.db.")
    return ensure_store(str(uri))


def _aliases(versions: list[RegisteredVersion]) -> dict[str, int]:
    return {alias: version.version for version in versions for alias in version.aliases}
