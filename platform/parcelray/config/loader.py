"""Reads a job file, applies `--set a.b=c`, validates it, and says exactly what is wrong."""

import copy
import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from parcelray.config.base import RENAMED_KEYS
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.promote import PromoteJob
from parcelray.config.search_space import SearchSpace
from parcelray.config.serve import ServeJob
from parcelray.config.train import TrainJob
from parcelray.config.tune import TuneJob
from parcelray.errors import UserError

StoredJob = TrainJob | EvaluateJob | TuneJob | PromoteJob
"""Jobs that leave files in a folder."""
Job = StoredJob | ServeJob
JobT = TypeVar("JobT", TrainJob, EvaluateJob, TuneJob, PromoteJob, ServeJob)
ModelT = TypeVar("ModelT", bound=BaseModel)
JOB_MODELS: dict[str, type[Job]] = {
    "train": TrainJob,
    "evaluate": EvaluateJob,
    "tune": TuneJob,
    "promote": PromoteJob,
    "serve": ServeJob,
}
_COMMANDS = {"promote": "models promote"}
"""Of the kinds whose command is not called as they are."""
# Where a run is kept, who records it, what computes it and what follows it do not change the result, so they are no
# part of its identity. Jobs that were stored before the key was renamed have `rivals` instead of `baselines`.
_NOT_IDENTITY = (
    "storage",
    "tracking",
    "scaling",
    "compute",
    "max_concurrent",
    "stall_s",
    "baselines",
    "rivals",
    "confirm",
)


class ConfigError(UserError):
    """A configuration file that cannot be used; the message has one line per mistake."""


def load_job_of(model: type[JobT], path: str | Path, overrides: Sequence[str] = ()) -> JobT:
    """Reads one job file of a certain kind; see `load_job`.

    Raises:
        ConfigError: it describes another kind of job, or is not legal.
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

    Args:
        path: YAML file.
        overrides: `a.b=value` texts, applied in order; the value is read as YAML.

    Raises:
        ConfigError: naming the file, the key path, the value and what is legal.
    """
    data = read_yaml(path)
    kind = data.get("kind")
    if kind == "tune":
        _inline(data, Path(path))
    for override in overrides:
        apply_override(data, override)
    if not isinstance(kind, str) or kind not in JOB_MODELS:
        raise ConfigError(
            f"{path}: kind is {kind!r}; legal: {', '.join(JOB_MODELS)}{_did_you_mean(str(kind), JOB_MODELS)}."
        )
    return validate(JOB_MODELS[kind], data, str(path))


def _inline(search: dict[str, Any], path: Path) -> None:
    """Puts in place of the files that a search names what they hold, so that it is one whole job, whose every key can be set.

    Files are relative to the working folder, or to the project that the search's own file lies in (`jobs/tune/` is two
    levels deep).
    """
    named = search.get("space")
    if isinstance(named, str):
        search["space"] = read_yaml(_beside(named, path))
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
    data = read_yaml(_beside(file, path))
    for keys, value in changes.items():
        set_key(data, keys, value, str(path))
    return data


def _beside(file: str, path: Path) -> Path:
    return (
        Path(file) if Path(file).is_file() else path.resolve().parents[min(2, len(path.resolve().parents) - 1)] / file
    )


def command_of(kind: str) -> str:
    """What follows `parcelray` to run a job of a kind."""
    return _COMMANDS.get(kind, kind)


def load_search_space(path: str | Path) -> SearchSpace:
    """Reads and validates one file of `search_spaces/`.

    Raises:
        ConfigError: naming the file, the key path, the value and what is legal.
    """
    return validate(SearchSpace, read_yaml(path), str(path))


def check_search_space(space: SearchSpace, root: Path) -> None:
    """Refuses a space with a key or an end of a domain that its job does not take.

    Args:
        space: the space.
        root: folder that the space's job file is relative to.

    Raises:
        ConfigError: naming the key, the value and what is legal.
    """
    _check_space(space, read_yaml(root / space.job))


def check_search_space_of(job: TuneJob) -> None:
    """Refuses a search whose space has a key or an end of a domain that its job does not take.

    Raises:
        ConfigError: naming the key, the value and what is legal.
    """
    _check_space(job.space, job.base.model_dump(mode="json", exclude_unset=True))


def _check_space(space: SearchSpace, job: dict[str, Any]) -> None:
    for name, domain in space.parameters.items():
        for value in domain.ends:
            data = copy.deepcopy(job)
            for key, needed in (space.needs(name) | {name: value}).items():
                set_key(data, key, needed, f"search space {space.name}")
            validate(JOB_MODELS[str(job["kind"])], data, f"search space {space.name}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give the path of a job file such as"
            " jobs/train/nlvr_parcel.yaml."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text in UTF-8; save it in that encoding.") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML ({str(error).splitlines()[0]}); mend the syntax.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}, not a mapping; start it with 'kind: train'.")
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets `a.b=value` in place."""
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
    """Sets the value at a key path such as `a.b`, or `a.0.b` in a list, in place.

    Raises:
        ConfigError: something on the way is no mapping, or a list without that place; the message starts with `source`.
    """
    *parents, last = keys.split(".")
    target: Any = data
    for key, following in itertools.pairwise([*parents, last]):
        child = target[int(key)] if isinstance(target, list) else target.setdefault(key, {})
        if isinstance(child, list):
            if not following.isdecimal() or int(following) >= len(child):
                raise ConfigError(
                    f"{source}: {key} is a list of {len(child)}, which has no place {following}; legal: 0 to"
                    f" {len(child) - 1}."
                )
        elif not isinstance(child, dict):
            raise ConfigError(f"{source}: {key} is {child!r}, not a mapping, so nothing can be set below it.")
        target = child
    if isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value


def validate(model: type[ModelT], data: dict[str, Any], source: str) -> ModelT:
    """Validates a mapping, with one readable line per mistake."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [(_as_written(model, problem), dict(problem)) for problem in error.errors()]
        # Of a union, pydantic reports every member that it tried, and a list counts as empty once its items are
        # refused: what lies deeper is the mistake.
        deepest = [
            (path, problem)
            for path, problem in problems
            if not any(len(path) < len(other) and other[: len(path)] == path for other, _ in problems)
        ]
        raise ConfigError("\n".join(_explain(model, source, path, problem) for path, problem in deepest)) from None


def identity(job: Job) -> str:
    """`<kind>-<name>-<hash8 of the resolved config>`: the same identity is the same run."""
    return f"{job.kind}-{job.name}-{config_hash(job)}"


def config_hash(job: Job) -> str:
    """First 8 hex digits of the sha256 of the canonical JSON of everything that decides the result.

    What is unset is left out, so that a key that a later version adds does not make another run of every job.
    """
    text = json.dumps(decisive(job.model_dump(mode="json", exclude_none=True)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def decisive(job: dict[str, Any]) -> dict[str, Any]:
    """What of a resolved job decides its result, also of the jobs inside it."""
    return {
        key: decisive(value) if isinstance(value, dict) else value
        for key, value in job.items()
        if key not in _NOT_IDENTITY
    }


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Key paths whose values differ, as `path: old -> new`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines


def _explain(model: type[BaseModel], source: str, location: Sequence[Any], problem: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in location)
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        legal = _legal_keys(model, problem["loc"][:-1])
        new = RENAMED_KEYS.get(str(location[-1]))
        if new in legal:
            return f"{source}: {path} is now called {new}; rename the key."
        return (
            f"{source}: {path} is not a known key; legal here:"
            f" {', '.join(legal)}{_did_you_mean(str(location[-1]), legal)}."
        )
    if problem["type"] == "missing":
        return f"{source}: {path} is missing; add it."
    if problem["type"] == "union_tag_not_found":
        return f"{source}: {path}.type is missing; add it to say which kind of {location[-1]} it is."
    if problem["type"] in ("union_tag_invalid", "literal_error"):
        context = problem["ctx"]
        legal_text = context.get("expected_tags") or context.get("expected", "")
        found = context.get("tag", value)
        legal = [part.strip(" '") for part in legal_text.replace(" or ", ",").split(",")]
        where = f"{path}.type" if problem["type"] == "union_tag_invalid" else path
        return f"{source}: {where} is {found!r}; legal: {', '.join(legal)}{_did_you_mean(str(found), legal)}."
    message = problem["msg"].removeprefix("Value error, ")
    shown = f" is {value!r}" if not isinstance(value, dict) else ""
    return f"{source}: {path}{shown}: {message[0].lower() + message[1:]}." if path else f"{source}: {message}."


def _as_written(model: type[BaseModel], problem: Mapping[str, Any]) -> list[Any]:
    """The key path as the file has it: pydantic's location names members of unions, too."""
    location = problem["loc"]
    # No field has the name of a key that is refused, and it may be that of a union's member.
    unknown = list(location[-1:]) if problem["type"] in ("extra_forbidden", "invalid_key") else []
    current: list[type[BaseModel]] = [model]
    written: list[Any] = []
    is_mapping = False
    for part in location[: len(location) - len(unknown)]:
        if is_mapping:
            written.append(part)
            is_mapping = False
            continue
        fields = [candidate.model_fields[part] for candidate in current if part in candidate.model_fields]
        members = [candidate for candidate in current if part in (_tag(candidate), candidate.__name__)]
        if fields or isinstance(part, int):
            written.append(part)
            current = [found for field in fields for found in _models_in(field.annotation)] or current
            is_mapping = any(get_origin(field.annotation) is dict for field in fields)
        elif members:
            current = members
    return written + unknown


def _legal_keys(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Field names of the model at a location of pydantic's error; union members appear there by their tag."""
    current: list[type[BaseModel]] = [model]
    for part in location:
        following: list[type[BaseModel]] = []
        for candidate in current:
            if isinstance(part, str) and part in candidate.model_fields:
                following += _models_in(candidate.model_fields[part].annotation)
            elif _tag(candidate) == part or candidate.__name__ == part:
                following.append(candidate)
        current = following or current
    return sorted({name for candidate in current for name in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    return field.default if field is not None else None


def _did_you_mean(word: str, legal: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(legal), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
