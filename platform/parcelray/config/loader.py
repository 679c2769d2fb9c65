"""Reading of job files: YAML, `--set a.b=c` overrides, nested files, and validation."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.explain import did_you_mean, problems, sentence
from parcelray.config.identity import Job
from parcelray.config.paths import WITH_TEXT
from parcelray.config.promote import PromoteJob
from parcelray.config.serve import ServeJob
from parcelray.config.train import TrainJob
from parcelray.config.tune import TuneJob
from parcelray.errors import UserError

JobT = TypeVar("JobT", TrainJob, EvaluateJob, TuneJob, PromoteJob, ServeJob)
ModelT = TypeVar("ModelT", bound=BaseModel)
JOB_MODELS: dict[str, type[Job]] = {
    "train": TrainJob,
    "evaluate": EvaluateJob,
    "tune": TuneJob,
    "promote": PromoteJob,
    "serve": ServeJob,
}
"""The model of each job kind."""
_COMMANDS = {"promote": "models promote"}
"""Commands of the job kinds whose command is not the name of the kind."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message has one line per mistake."""


def load_job_of(model: type[JobT], path: str | Path, overrides: Sequence[str] = ()) -> JobT:
    """Reads and validates one job file of a given kind; see `load_job`.

    Raises:
        ConfigError: the file describes another kind of job, or is invalid.
    """
    job = load_job(path, overrides)
    if not isinstance(job, model):
        wanted = next(kind for kind, known in JOB_MODELS.items() if known is model)
        raise ConfigError(
            f"{path}: kind is {job.kind}, but this command runs {wanted} jobs; run it with `parcelray"
            f" {command_of(job.kind)} {path}`."
        )
    return job


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Reads and validates one job file.

    Relative paths in the file and in the overrides are relative to the working folder; the job has absolute paths.

    Args:
        path: YAML file.
        overrides: `a.b=value` texts, applied in order; each value is parsed as YAML.

    Raises:
        ConfigError: the file cannot be used; names the file, the key path, the value and what is legal.
    """
    data = read_yaml(path)
    kind = data.get("kind")
    if kind == "tune":
        _inline(data, Path(path))
    for override in overrides:
        apply_override(data, override)
    if not isinstance(kind, str) or kind not in JOB_MODELS:
        raise ConfigError(f"{path}: kind is {kind!r}; legal: {', '.join(JOB_MODELS)}{did_you_mean(kind, JOB_MODELS)}.")
    return validate(JOB_MODELS[kind], data, str(path))


def command_of(kind: str) -> str:
    """The words that follow `parcelray` on the command line to run a job of a kind."""
    return _COMMANDS.get(kind, kind)


def _inline(search: dict[str, Any], path: Path) -> None:
    """Replaces the file names in a search by the content of the files, so that every nested key can be set.

    Paths are relative to the working folder. If no such file exists there, they are relative to the project that
    contains the search's own file (`jobs/tune/` is two levels deep).
    """
    named = search.get("space")
    if isinstance(named, str):
        search["space"] = read_yaml(_located(named, path))
    space = search.get("space")
    if isinstance(space, dict) and isinstance(space.get("job"), str):
        search["base"] = _changed(space["job"], search.get("base") or {}, path)
    confirm = search.get("confirm")
    if isinstance(confirm, dict) and isinstance(confirm.get("job"), str):
        confirm["job"] = _changed(confirm["job"], confirm.pop("set", {}), path)
    evaluation = search.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("job"), str):
        search["evaluation"] = _changed(evaluation["job"], evaluation.get("set") or {}, path)


def _changed(file: str, changes: dict[str, Any], path: Path) -> dict[str, Any]:
    data = read_yaml(_located(file, path))
    for keys, value in changes.items():
        set_key(data, keys, value, str(path))
    return data


def _located(file: str, path: Path) -> Path:
    if Path(file).expanduser().is_file():
        return Path(file).expanduser()
    parents = path.resolve().parents
    return parents[min(2, len(parents) - 1)] / file


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file that contains a mapping.

    Raises:
        ConfigError: the file cannot be read, is not YAML or does not contain a mapping.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give the path of a job file such as"
            " jobs/train/nlvr_parcel.yaml."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save the file in UTF-8.") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML ({str(error).splitlines()[0]}); fix the syntax.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: contains a {type(data).__name__}, not a mapping; start it with 'kind: train'.")
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Applies one `a.b=value` override in place."""
    keys, separator, value = override.partition("=")
    if not separator or not all(keys.split(".")):
        raise ConfigError(
            f"--set {override}: is not of the form a.b=value; write for example --set training.steps=100."
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value {value!r} is not YAML; quote it.") from None
    set_key(data, keys, parsed, f"--set {override}")


def set_key(data: dict[str, Any], keys: str, value: Any, source: str) -> None:
    """Sets the value at a key path such as `a.b`, or `a.0.b` for index 0 of a list, in place.

    Raises:
        ConfigError: a key on the path has no mapping as value, or its list has no such index; the message starts with
            `source`.
    """
    *parents, last = keys.split(".")
    target: Any = data
    for key, following in itertools.pairwise([*parents, last]):
        child = target[int(key)] if isinstance(target, list) else target.setdefault(key, {})
        if isinstance(child, list):
            if not following.isdecimal() or int(following) >= len(child):
                raise ConfigError(
                    f"{source}: {key} is a list of {len(child)} items and has no index {following}; legal: 0 to"
                    f" {len(child) - 1}."
                )
        elif not isinstance(child, dict):
            raise ConfigError(f"{source}: {key} is {child!r}, not a mapping, so no key can be set below it.")
        target = child
    if isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value


def changed(job: JobT, changes: Mapping[str, Any], source: str, *, folder: str | None = None) -> JobT:
    """Returns a job with other values of some keys. It may be called in a process with another working folder.

    Args:
        job: the job; the paths that were set in it stay what they are.
        changes: values by key path.
        source: start of error messages.
        folder: folder that relative paths in the changes and in the defaults are relative to: the working folder of
            the driver; None: that of this process.

    Raises:
        ConfigError: the job does not accept one of the values.
    """
    data = job.model_dump(mode="json", exclude_unset=True, context=WITH_TEXT)
    for keys, value in changes.items():
        set_key(data, keys, value, source)
    return validate(type(job), data, source, folder=folder)


def validate(model: type[ModelT], data: dict[str, Any], source: str, *, folder: str | None = None) -> ModelT:
    """Validates a mapping against a model.

    Args:
        model: the model.
        data: the mapping.
        source: start of each line of an error message.
        folder: folder that relative paths are relative to; None: the working folder.

    Raises:
        ConfigError: the mapping is invalid; the message has one line per mistake, each starting with `source`.
    """
    try:
        return model.model_validate(data, context={"folder": folder or os.getcwd()})
    except ValidationError as error:
        lines = [f"{source}: {sentence(problem, _shown)}." for problem in problems(model, error)]
        raise ConfigError("\n".join(lines)) from None


def _shown(value: Any) -> str:
    """A rejected value as part of a message; mappings are left out because they are long."""
    return "" if isinstance(value, dict) else repr(value)
