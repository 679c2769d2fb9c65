"""`parcelray models list|show|rollback`: the registry as pages."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parcelray.config.train import TrackingConfig
from parcelray.errors import UserError
from parcelray.tracking.model_versions import VersionPage, find_version, model_names, versions_of
from parcelray.tracking.registry import CHAMPION, PREVIOUS, rollback
from parcelray.tracking.store import ensure_store

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ModelList:
    """The registered models, each with its versions."""

    models: dict[str, list[VersionPage]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "models": [
                {"name": name, "versions": len(pages), "aliases": _aliases(pages)}
                for name, pages in self.models.items()
            ]
        }

    def to_rich(self) -> "Table":
        """For the console."""
        from rich.table import Table

        table = Table("model", "versions", "newest", "aliases")
        for name, pages in self.models.items():
            aliases = ", ".join(f"{alias}: {version}" for alias, version in _aliases(pages).items())
            table.add_row(name, str(len(pages)), pages[0].created if pages else "-", aliases or "-")
        return table


@dataclass(frozen=True)
class ModelPage:
    """Versions of one model, or everything about one of them."""

    name: str
    versions: list[VersionPage]
    whole: bool
    """Whether all that is known is shown."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"name": self.name, "versions": [page.to_dict() for page in self.versions]}

    def to_rich(self) -> "Table":
        """For the console."""
        from rich.table import Table

        if self.whole:
            (page,) = self.versions
            table = Table("property", "value", title=f"models:/{self.name}/{page.version}")
            facts = {
                "aliases": ", ".join(page.aliases) or "-",
                "created": page.created,
                "MLflow run": page.run_id,
                **page.tags,
            }
            for key, value in facts.items():
                table.add_row(key, value)
            return table
        table = Table("version", "aliases", "created", "gates", "content", title=self.name)
        for page in self.versions:
            content = page.tags.get("parcel.content", "-")[:19]
            table.add_row(str(page.version), ", ".join(page.aliases), page.created, page.verdict or "-", content)
        return table


def list_models(tracking_uri: str | None) -> ModelList:
    """All registered models.

    Args:
        tracking_uri: of the registry; None: the jobs' default.
    """
    uri = _store(tracking_uri)
    return ModelList({name: versions_of(uri, name) for name in model_names(uri)})


def show_model(name: str, version: str | None, tracking_uri: str | None) -> ModelPage:
    """A model's versions, or one of them by number or alias.

    Raises:
        UserError: there is no such model or version.
    """
    uri = _store(tracking_uri)
    return ModelPage(
        name,
        versions_of(uri, name) if version is None else [find_version(uri, name, version)],
        whole=version is not None,
    )


def roll_back(name: str, tracking_uri: str | None) -> ModelPage:
    """Makes the previous champion the champion again; returns the two versions.

    Raises:
        UserError: there was no champion before this one.
    """
    uri = _store(tracking_uri)
    rollback(uri, name)
    return ModelPage(
        name, [page for page in versions_of(uri, name) if {CHAMPION, PREVIOUS} & set(page.aliases)], whole=False
    )


def _store(tracking_uri: str | None) -> str:
    uri = TrackingConfig().uri if tracking_uri is None else tracking_uri
    if uri in (None, "none"):
        raise UserError("The registry is in the tracking store; give a tracking URI such as sqlite:///runs/mlflow.db.")
    return ensure_store(str(uri))


def _aliases(pages: list[VersionPage]) -> dict[str, int]:
    return {alias: page.version for page in pages for alias in page.aliases}
