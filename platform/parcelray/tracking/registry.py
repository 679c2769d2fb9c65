"""The model registry: registers checkpoints as versions, moves aliases, and resolves references to checkpoint folders.

A version is a models-from-code pyfunc around the checkpoint folder (safetensors, configuration, manifest); nothing in
it is pickled. Only MLflow's client API is used: its fluent functions depend on a global tracking URI and an active run.
"""

import base64
import functools
import importlib.metadata
import io
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlparse

import mlflow.artifacts
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema
from PIL import Image

import parcelray
from parcelray.config.model import CheckpointModelConfig
from parcelray.errors import UserError
from parcelray.models.checkpoint import ResolvedCheckpoint, resolve_checkpoint
from parcelray.models.host_cache import OnProgress, cache_root, downloaded_model
from parcelray.models.manifest import MANIFEST_NAME, files_digest, read_manifest, verified_digest
from parcelray.tracking.store import clean_tags, ensure_store, store_lock

CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS = "previous"
CONTENT_TAG = "parcel.content"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "prompt"), ColSpec("string", "image"), ColSpec("long", "num_visual_tokens")]),
    outputs=Schema([ColSpec("string", "answer")]),
)
_MODEL_SUBPATH = "artifacts/model"
_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,99}")
_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)


def register_model(
    tracking_uri: str,
    model_dir: Path,
    name: str,
    run_id: str,
    *,
    pyfunc_file: Path,
    example_budget: int = 64,
    tags: Mapping[str, str] | None = None,
) -> int:
    """Upload a checkpoint as the next version of a registered model.

    Registering the same content from the same run again returns the existing version.

    Args:
        tracking_uri: as returned by `store.ensure_store`; the registry is in the same store.
        model_dir: checkpoint folder with a manifest (`models.manifest.write_manifest`).
        name: registered model; created if missing.
        run_id: the MLflow run that produced the checkpoint.
        pyfunc_file: Python file that MLflow copies into the version and runs on load (models from code).
        example_budget: num_visual_tokens of the input example; must be a budget that the model supports.
        tags: further tags of the version, such as scores.

    Returns:
        The version number.

    Raises:
        UserError: the name is not legal, or the folder contains pickles, has no manifest, or differs from its manifest.
    """
    if _NAME.fullmatch(name) is None:
        raise UserError(
            f"Model name {name!r} is not legal; use at most 100 letters, digits, '-' and '_', and start with a letter"
            " or digit."
        )
    manifest = read_manifest(model_dir)
    content = resolve_checkpoint(model_dir.resolve()).pinned
    client = MlflowClient(tracking_uri=tracking_uri)
    for version in client.search_model_versions(f"name='{name}' and run_id='{run_id}'"):
        if version.tags.get(CONTENT_TAG) == content:
            return int(version.version)
    logged = _log_model(client, model_dir, name, run_id, pyfunc_file, example_budget)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    own_tags = {
        CONTENT_TAG: content,
        "parcel.version": manifest.parcelray_version,
        "parcel.git_commit": manifest.git_commit or "unknown",
    }
    created = client.create_model_version(
        name, logged.artifact_location, run_id, tags=clean_tags({**(tags or {}), **own_tags}), model_id=logged.model_id
    )
    return int(created.version)


def promote(
    tracking_uri: str, name: str, version: int, alias: str = CHAMPION, *, expected: int | Literal["any"] | None = "any"
) -> None:
    """Point an alias at a version.

    For `champion`, the former champion gets the alias `previous` first; the champion alias moves last.

    Args:
        tracking_uri: as for `register_model`.
        name: registered model.
        version: an existing version.
        alias: `champion`, `challenger` or any other legal name.
        expected: the version that the alias must point to before the call (None: no version), because the decision was
            based on it; `any` for no such condition.

    Raises:
        UserError: the alias is reserved, the version does not exist, or the alias does not point to `expected`.
    """
    if alias == PREVIOUS or _RESERVED_ALIAS.fullmatch(alias) or re.fullmatch(r"[\w-]{1,255}", alias) is None:
        raise UserError(
            f"Alias {alias!r} cannot be set: 'latest' and 'v<number>' are reserved by MLflow, and 'previous' is set"
            " together with 'champion'. Use champion, challenger, or another name of letters, digits, '-' and '_'."
        )
    client = MlflowClient(tracking_uri=tracking_uri)
    check_version(client, name, version)
    with store_lock(tracking_uri):
        former = aliases_of(client, name).get(alias)
        if former == version:
            return
        if expected not in ("any", former):
            was, now = (f"version {each}" if each is not None else "no version" for each in (expected, former))
            raise UserError(
                f"The alias {alias} of model {name!r} pointed to {was} when this decision was made, and points to {now}"
                " now; run the command again."
            )
        if alias == CHAMPION and former is not None:
            client.set_registered_model_alias(name, PREVIOUS, str(former))
        client.set_registered_model_alias(name, alias, str(version))


def rollback(tracking_uri: str, name: str) -> int:
    """Exchange the aliases `champion` and `previous`; returns the version that is the champion now.

    `champion` moves first, so that between the two moves the restored version is already the champion.

    Raises:
        UserError: there was no champion before this one.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    with store_lock(tracking_uri):
        aliases = aliases_of(client, name)
        previous, champion = aliases.get(PREVIOUS), aliases.get(CHAMPION)
        if previous is None or previous == champion:
            raise UserError(f"Model {name!r} has no previous champion to go back to; promote a version by its number.")
        client.set_registered_model_alias(name, CHAMPION, str(previous))
        if champion is not None:
            client.set_registered_model_alias(name, PREVIOUS, str(champion))
    return previous


def resolve_registry(reference: str, tracking_uri: str, on_progress: OnProgress | None = None) -> tuple[Path, str]:
    """Resolve a registry reference to a checkpoint folder and the version that the reference names now.

    A version in a remote store is downloaded once into the host's cache (`models.host_cache`).

    Args:
        reference: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        tracking_uri: as for `register_model`.
        on_progress: receives the progress of a download; None: lines on standard error.

    Returns:
        The checkpoint folder (not verified here: `models.checkpoint.resolve_checkpoint` does that) and
        `models:/NAME/VERSION`.

    Raises:
        UserError: the reference is malformed, or there is no such version.
    """
    name, version, uri = _located(reference, tracking_uri)
    parsed = urlparse(uri)
    if parsed.scheme in ("", "file"):
        folder = Path(unquote(parsed.path)) / _MODEL_SUBPATH
        if not folder.is_dir():
            raise UserError(
                f"{reference!r} is version {version}, but its files ({folder}) are not on this machine; use a tracking"
                " server, or register the checkpoint again."
            )
    else:
        folder = _downloaded(f"models:/{name}/{version}", uri, tracking_uri, on_progress)
    return folder, f"models:/{name}/{version}"


def read_version_file(reference: str, tracking_uri: str, name: str) -> bytes:
    """Download one file of the checkpoint of a registered version.

    Args:
        reference: see `resolve_registry`.
        tracking_uri: as for `register_model`.
        name: path of the file in the checkpoint folder.
    """
    uri = _located(reference, tracking_uri)[2]
    with tempfile.TemporaryDirectory() as scratch:
        return _fetch(f"{uri}/{_MODEL_SUBPATH}/{name}", Path(scratch), tracking_uri).read_bytes()


def _located(reference: str, tracking_uri: str) -> tuple[str, int, str]:
    """Returns the name and version of a registry reference, and the URI of the version's files."""
    parts = _REFERENCE.fullmatch(reference)
    if parts is None:
        raise UserError(
            f"Registry reference {reference!r} is malformed; write models:/NAME@ALIAS or models:/NAME/VERSION, where"
            " VERSION is a number."
        )
    name = parts["name"]
    client = MlflowClient(tracking_uri=tracking_uri)
    if parts["version"]:
        version = int(parts["version"])
        check_version(client, name, version)
    else:
        version = _version_of_alias(client, name, parts["alias"])
    return name, version, client.get_model_version_download_uri(name, str(version))


def resolve_model(model: CheckpointModelConfig, tracking_uri: str | None) -> ResolvedCheckpoint:
    """Resolve a job's model reference to a checkpoint folder and a pinned version.

    Args:
        model: the reference.
        tracking_uri: store whose registry `models:/...` is looked up in; None: such references are refused.
    """
    if tracking_uri is None or not model.reference.startswith("models:/"):
        return resolve_checkpoint(model.reference)
    uri = ensure_store(tracking_uri)
    resolved = resolve_checkpoint(
        model.reference, registry_resolver=functools.partial(resolve_registry, tracking_uri=uri)
    )
    local = None if resolved.path.is_relative_to(cache_root()) else str(resolved.path)
    return resolved._replace(pin=resolved.pin.model_copy(update={"tracking_uri": str(uri), "registry_folder": local}))


def input_example(num_visual_tokens: int) -> pd.DataFrame:
    """A data frame with one row that matches the signature: a prompt, a small white PNG in base64, and a budget."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(buffer, format="PNG")
    return pd.DataFrame(
        {
            "prompt": ["What is in the image?"],
            "image": [base64.b64encode(buffer.getvalue()).decode()],
            "num_visual_tokens": [num_visual_tokens],
        }
    )


def _log_model(
    client: MlflowClient, model_dir: Path, name: str, run_id: str, pyfunc_file: Path, example_budget: int
) -> LoggedModel:
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment_id, name=name, source_run_id=run_id, model_type="elastic-vlm")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            wrapper = Path(scratch) / "model"
            _save_wrapper(wrapper, logged, run_id, pyfunc_file, example_budget)
            client.log_model_artifacts(logged.model_id, str(wrapper))
        # The weights are uploaded from the checkpoint folder, without a copy in the temporary folder.
        client.log_model_artifacts(logged.model_id, str(model_dir), _MODEL_SUBPATH)
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return client.finalize_logged_model(logged.model_id, "READY")


def _save_wrapper(path: Path, logged: LoggedModel, run_id: str, pyfunc_file: Path, example_budget: int) -> None:
    model = Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id)
    with warnings.catch_warnings():
        # MLflow warns about its own type hints when mlflow.pyfunc is imported, and uses a deprecated pandas call.
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred", category=UserWarning)
        warnings.filterwarnings("ignore", message="Operation with range", category=DeprecationWarning)
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(pyfunc_file),
            signature=SIGNATURE,
            input_example=input_example(example_budget),
            pip_requirements=_requirements(),
            mlflow_model=model,
        )
    # The wrapper is saved without the weights, which are uploaded later. A version must not contain paths of the
    # machine that registered it.
    flavor = model.flavors[mlflow.pyfunc.FLAVOR_NAME]
    flavor["artifacts"] = {"model": {"path": _MODEL_SUBPATH, "uri": _MODEL_SUBPATH}}
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    model.save(str(path / "MLmodel"))


def _requirements() -> list[str]:
    # A local version label ("+cpu") names a build that another machine may not have.
    pins = [
        f"{package}=={importlib.metadata.version(package).partition('+')[0]}"
        for package in ("mlflow", "torch", "transformers", "safetensors", "pillow")
    ]
    return [f"parcelray=={parcelray.__version__}", *pins]


def aliases_of(client: MlflowClient, name: str) -> dict[str, int]:
    """The aliases of a registered model, each with its version.

    Raises:
        UserError: there is no such model.
    """
    try:
        model: Any = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = ", ".join(model.name for model in client.search_registered_models(max_results=20)) or "none"
        raise UserError(f"There is no registered model {name!r}; the registered models are: {known}.") from error
    return {alias: int(version) for alias, version in model.aliases.items()}


def _version_of_alias(client: MlflowClient, name: str, alias: str) -> int:
    aliases = aliases_of(client, name)
    if alias not in aliases:
        known = ", ".join(sorted(aliases)) or "none"
        raise UserError(
            f"Model {name!r} has no alias {alias!r}; its aliases are: {known}. Promote a version, or use a version"
            " number."
        )
    return aliases[alias]


def check_version(client: MlflowClient, name: str, version: int) -> None:
    """Check that a version exists.

    Raises:
        UserError: there is no such version.
    """
    try:
        client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = (
            ", ".join(
                str(number)
                for number in sorted(int(each.version) for each in client.search_model_versions(f"name='{name}'"))
            )
            or "none"
        )
        raise UserError(f"Model {name!r} has no version {version}; its versions are: {known}.") from error


def _downloaded(version: str, uri: str, tracking_uri: str, on_progress: OnProgress | None) -> Path:
    """Download the checkpoint of a version into the host's cache, unless its content is there."""
    # The manifest tells the content, so that a version that the cache has is not downloaded again.
    with tempfile.TemporaryDirectory() as scratch:
        manifest = read_manifest(_fetch(f"{uri}/{_MODEL_SUBPATH}/{MANIFEST_NAME}", Path(scratch), tracking_uri).parent)
    return downloaded_model(
        files_digest(manifest.files),
        lambda folder: _fetch(f"{uri}/{_MODEL_SUBPATH}", folder, tracking_uri),
        verified_digest,
        name=version,
        num_bytes=sum(entry.bytes for entry in manifest.files.values()),
        on_progress=on_progress,
    )


def _fetch(artifact_uri: str, folder: Path, tracking_uri: str) -> Path:
    return Path(
        mlflow.artifacts.download_artifacts(artifact_uri=artifact_uri, dst_path=str(folder), tracking_uri=tracking_uri)
    )
