"""Path keys of job files: absolute from the moment that a job is read, with the text of the file kept beside them.

A relative path is relative to the folder where the command runs, and `~` is the home folder. Ray's workers run in
another folder, so every path key is made absolute when the job is validated. The identity of a run uses the text as it
was written: the same job file is the same run on every machine, and a project can be moved.
"""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import GetCoreSchemaHandler, SerializationInfo, ValidationInfo
from pydantic_core import CoreSchema, core_schema

PACKAGED = (
    "mini_base",
    "mini_llava",
    "mini_llava_siglip",
    "mini_llava_convnext",
    "mini_parcel",
    "mini_m3",
    "mini_mqt",
    "mini_vanilla",
)
"""Names of the checkpoints that are part of the package."""
AS_WRITTEN = {"paths": "as_written"}
"""Context of `model_dump` that gives path keys as they were written, for identities and records of a run."""
WITH_TEXT = {"paths": "with_text"}
"""Context of `model_dump` that gives path keys as mappings of both forms where they differ; validation accepts them.

A job that is dumped and validated again, in this process or in another folder, thereby keeps its paths and identity.
"""
SQLITE_PREFIX = "sqlite:///"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
"""Start of a URI, such as s3://, models:/ or postgresql+psycopg2://."""
_HUB_ID = re.compile(r"(hf:.*|[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?)")

PathKind = Literal["path", "reference", "tracking"]


class PathText(str):
    """An absolute path, or another text such as a URI, with the text that it was written as."""

    written: str

    def __new__(cls, value: str, written: str) -> "PathText":
        """Creates the text of an absolute path from that path and the text that it was written as."""
        text = super().__new__(cls, value)
        text.written = written
        return text

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        """Returns the arguments of `__new__`, for copies and pickles."""
        return str(self), self.written


class PathKey(NamedTuple):
    """Annotation of a text field that holds a path; see `LocalPath`, `ModelReference` and `TrackingUri`."""

    kind: PathKind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Returns pydantic's schema: a string that is made absolute when it is validated."""
        return core_schema.with_info_wrap_validator_function(
            self._validate,
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(
                _serialized, info_arg=True, when_used="json"
            ),
        )

    def _validate(self, value: Any, handler: core_schema.ValidatorFunctionWrapHandler, info: ValidationInfo) -> str:
        if isinstance(value, PathText):
            return value
        if isinstance(value, Mapping) and value.keys() == {"path", "written"}:
            return PathText(handler(value["path"]), handler(value["written"]))
        text = handler(value)
        return PathText(self.absolute(text, (info.context or {}).get("folder") or os.getcwd()), text)

    def absolute(self, text: str, folder: str) -> str:
        """Returns the absolute form of a text, relative to a folder; URIs, names and aliases are returned unchanged.

        Raises:
            ValueError: the text starts with the home folder of an unknown user.
        """
        if self.kind == "tracking":
            file, separator, options = text.removeprefix(SQLITE_PREFIX).partition("?")
            if not text.startswith(SQLITE_PREFIX) or file in ("", ":memory:"):
                return text
            return SQLITE_PREFIX + _absolute(file, folder) + separator + options
        if not text or _SCHEME.match(text) or (self.kind == "reference" and not _names_folder(text, folder)):
            return text
        return _absolute(text, folder)


LocalPath = Annotated[str, PathKey("path")]
"""A file or folder; URIs (`s3://...`) are left as they are."""
ModelReference = Annotated[str, PathKey("reference")]
"""A checkpoint: a folder becomes absolute; packaged names, hub ids, aliases, versions and URIs stay as they are."""
TrackingUri = Annotated[str, PathKey("tracking")]
"""An MLflow tracking URI; the database file of a SQLite URI becomes absolute."""


def check_storage(storage: str, *, in_process: bool) -> None:
    """Refuses storage in memory for a job that has other processes.

    Raises:
        ValueError: the storage is `memory://...`, and the job does not run in this process alone.
    """
    if storage.startswith("memory:") and not in_process:
        raise ValueError(
            f"storage {storage} exists only in the process that writes it, but this job uses Ray; use a folder,"
            " s3://... or gs://..., or run the job in one process"
        )


def written(text: str) -> str:
    """Returns the text that a path was written as; other texts are returned unchanged."""
    return text.written if isinstance(text, PathText) else text


def _serialized(value: str, info: SerializationInfo) -> str | dict[str, str]:
    form = (info.context or {}).get("paths")
    if form == "with_text" and written(value) != value:
        return {"path": str(value), "written": written(value)}
    return written(value) if form == "as_written" else str(value)


def _absolute(text: str, folder: str) -> str:
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"{text} starts with the home folder of an unknown user; write an absolute path")
    return os.path.normpath(os.path.join(folder, expanded))


def _names_folder(text: str, folder: str) -> bool:
    """Whether a model reference is a folder; a text of the form ORG/NAME is one only if the folder exists."""
    if text in PACKAGED:
        return False
    if text.startswith(("~", ".", "/")):
        return True
    return ("/" in text and _HUB_ID.fullmatch(text) is None) or os.path.isdir(os.path.join(folder, text))
