"""Explanations of pydantic errors: one plain sentence per mistake, for YAML files and for JSON bodies."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from parcelray.config.base import BY_KEY, RENAMED_KEYS

_DISCRIMINATORS = ("type", "kind", "role")
"""Names of the fields that select one variant of a union."""
_MAX_SUGGESTED = 80
"""Longest key or value for which a similar legal one is suggested, characters; the comparison takes quadratic time."""
_MAX_PROBLEMS = 100
"""Largest number of errors that are explained, so that a hostile input with millions of errors costs little time."""
_VALID = "input should be a valid "
"""Start of pydantic's message about a value of the wrong type; the name of the type follows."""
_NEEDS_MAPPING = ("model_type", "model_attributes_type", "dict_type")


class Problem(NamedTuple):
    """One mistake in the input, located by the keys that the user wrote."""

    path: str
    """Key path such as `data.families.0`; empty for the whole input."""
    kind: str
    """Error type of pydantic, such as `missing` or `extra_forbidden`."""
    value: Any
    """The rejected value."""
    message: str
    """Message of pydantic or of one of our validators, without a final period."""
    key: str = ""
    """Key that selects the variant of a union, for errors about it."""
    legal: tuple[str, ...] = ()
    """Legal keys or values, where the error has a finite set of them."""


def problems(model: type[BaseModel], error: ValidationError) -> list[Problem]:
    """Lists the mistakes behind a validation error.

    Pydantic reports every variant of a union that it tried, and a list counts as empty once its items are rejected.
    Only the errors at the deepest keys are therefore kept.

    Args:
        model: the model that was validated.
        error: the error that pydantic raised.
    """
    found = [_problem(model, detail) for detail in error.errors(include_url=False)[:_MAX_PROBLEMS]]
    parents = {keys[:length] for keys, _ in found for length in range(len(keys))}
    by_keys: dict[tuple[Any, ...], list[Problem]] = {}
    for keys, problem in found:
        if keys not in parents:
            by_keys.setdefault(keys, []).append(problem)
    return [problem for same in by_keys.values() for problem in _of_one_value(same)]


def _of_one_value(found: Sequence[Problem]) -> Sequence[Problem]:
    """Leaves out the types that a value does not have if it has another legal type, or else joins them."""
    of_its_type = [problem for problem in found if problem.message.partition(_VALID)[0]]
    if of_its_type or len(found) == 1:
        return of_its_type or found
    types = " or ".join(dict.fromkeys(problem.message.removeprefix(_VALID).partition(",")[0] for problem in found))
    return [found[0]._replace(message=_VALID + types)]


def sentence(problem: Problem, show: Callable[[Any], str] = repr) -> str:
    """Writes one mistake as a sentence without a final period: what is wrong and what is legal.

    Args:
        problem: one of `problems`.
        show: writes the rejected value; an empty text leaves it out.
    """
    path, legal = problem.path, ", ".join(problem.legal)
    selector = ".".join(part for part in (path, problem.key) if part)
    match problem.kind:
        case "extra_forbidden":
            return _unknown_key(problem)
        case "missing":
            return f"{path} is missing; add it"
        case "union_tag_not_found":
            return f"{selector} is missing; add it: one of {legal}"
        case "union_tag_invalid" | "literal_error":
            return f"{selector} is {show(problem.value)}; legal: {legal}{did_you_mean(problem.value, problem.legal)}"
    if not path:
        return problem.message
    value = show(problem.value)
    return f"{path} is {value}: {problem.message}" if value else f"{path}: {problem.message}"


def did_you_mean(word: Any, legal: Iterable[str]) -> str:
    """Suggests the legal word that is closest to a misspelt one, as ` (did you mean X?)`, or gives an empty text."""
    if not isinstance(word, str) or len(word) > _MAX_SUGGESTED:
        return ""
    close = difflib.get_close_matches(word, list(legal), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _unknown_key(problem: Problem) -> str:
    key = problem.path.rpartition(".")[2]
    new = RENAMED_KEYS.get(key)
    if new in problem.legal:
        return f"{problem.path} is now called {new}; rename the key"
    return (
        f"{problem.path} is not a known key; legal here: {', '.join(problem.legal)}{did_you_mean(key, problem.legal)}"
    )


def _problem(model: type[BaseModel], detail: Any) -> tuple[tuple[Any, ...], Problem]:
    """Returns the keys that the user wrote, and the mistake at these keys."""
    kind, location, value = detail["type"], list(detail["loc"]), detail["input"]
    # No field has the name of a rejected key, and a variant of a union may have it.
    unknown = [location.pop()] if kind in ("extra_forbidden", "invalid_key") else []
    written, models = _located(model, location)
    message = detail["msg"].removeprefix("Value error, ")
    key = ""
    legal: tuple[str, ...] = ()
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        legal = tuple(sorted({name for candidate in models for name in candidate.model_fields}))
    elif kind == "union_tag_not_found":
        key = context["discriminator"].strip("'")
        legal = tuple(sorted({tag for candidate in models for tag in _tags(candidate)}))
    elif kind == "union_tag_invalid":
        key, value, legal = context["discriminator"].strip("'"), context["tag"], _listed(context["expected_tags"])
    elif kind == "literal_error":
        legal = _listed(context["expected"])
    elif kind in _NEEDS_MAPPING:
        message = "must be a mapping of keys to values"
    elif written and not kind.startswith("value_error"):
        message = message[0].lower() + message[1:]
    keys = (*written, *unknown)
    return keys, Problem(".".join(str(part) for part in keys), kind, value, message, key, legal)


def _listed(expected: str) -> tuple[str, ...]:
    """Reads pydantic's list of legal values, such as `'fp32', 'bf16' or 'fp16'`."""
    return tuple(part.strip(" '") for part in expected.replace(" or ", ",").split(","))


def _located(model: type[BaseModel], location: Sequence[Any]) -> tuple[list[Any], list[type[BaseModel]]]:
    """Translates a location of pydantic, which also names the variants of unions.

    Returns:
        The keys as the user wrote them, and the models that the location may belong to.
    """
    written: list[Any] = []
    models: list[type[BaseModel]] = [model]
    is_variant_open = is_mapping = False
    for part in location:
        if is_mapping:
            written.append(part)
            is_mapping = False
            continue
        if part == BY_KEY:
            is_mapping = True
            continue
        variants = [candidate for candidate in models if part == candidate.__name__ or part in _tags(candidate)]
        fields = [candidate.model_fields[part] for candidate in models if part in candidate.model_fields]
        if (is_variant_open or not fields) and variants:
            models, is_variant_open = variants, False
        elif isinstance(part, int):
            written.append(part)
        elif fields:
            written.append(part)
            following = [found for field in fields for found in _models_in(field.annotation)]
            models, is_variant_open = following or models, len(following) > 1
            is_mapping = any(get_origin(_unwrapped(field.annotation)) is dict for field in fields)
    return written, models


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    """The values by which a variant of a union is selected."""
    fields = [field for name, field in model.model_fields.items() if name in _DISCRIMINATORS]
    return tuple(
        tag for field in fields if get_origin(field.annotation) is Literal for tag in get_args(field.annotation)
    )


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _unwrapped(annotation: Any) -> Any:
    """An annotation without `Annotated` and without `| None`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _unwrapped(arguments[0])
    kept = [argument for argument in arguments if argument is not NoneType]
    return _unwrapped(kept[0]) if origin in (Union, UnionType) and len(kept) == 1 else annotation
