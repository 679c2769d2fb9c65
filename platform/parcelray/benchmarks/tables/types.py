"""The column types of the catalog, and the check of cells against them."""

from typing import Any

import pyarrow as pa

from parcelray.errors import UserError

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SIMPLE = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "binary": pa.binary(),
    "int8": pa.int8(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "image": _IMAGE,
}
_SHOWN = 60
_MOST_DIGITS = 19
_TRUE = (1, "True", "true")
_FALSE = (0, "False", "false")


def arrow_type(text: str) -> pa.DataType:
    """Parses a type of the catalog: string, int64, image, list<...>, or struct<name: type, ...>.

    Raises:
        UserError: there is no such type.
    """
    text = text.strip()
    if text.startswith("list<") and text.endswith(">"):
        return pa.list_(arrow_type(text[5:-1]))
    if text.startswith("struct<") and text.endswith(">"):
        fields = [part.partition(":") for part in split_fields(text[7:-1])]
        return pa.struct([(name.strip(), arrow_type(inner)) for name, _, inner in fields])
    if text not in _SIMPLE:
        raise UserError(
            f"There is no column type {text!r}; legal: {', '.join(_SIMPLE)}, list<TYPE>, struct<NAME: TYPE, ...>."
        )
    return _SIMPLE[text]


def fits(value: Any, kind: pa.DataType) -> bool:
    """Returns whether a cell can be read as a type without a change of its meaning.

    An empty cell fits every type. Text fits a whole number if it consists of digits, and a whole number fits text, as
    files without types (JSON lines, CSV) exchange the two. `as_declared` gives such a cell its type.
    """
    if value is None:
        return True
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(fits(entry, kind.value_type) for entry in value)
    if pa.types.is_struct(kind):
        return isinstance(value, dict) and all(fits(value.get(field.name), field.type) for field in kind)
    if pa.types.is_string(kind):
        return isinstance(value, str | int) and not isinstance(value, bool)
    if pa.types.is_boolean(kind):
        return value in (*_TRUE, *_FALSE)
    if pa.types.is_integer(kind):
        return not isinstance(value, bool) and (isinstance(value, int) or _is_whole(value))
    if pa.types.is_floating(kind):
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_float(value)
    return isinstance(value, bytes)


def as_declared(value: Any, kind: pa.DataType) -> Any:
    """Converts a cell that `fits` a type to this type, so that its source, with or without types, makes no difference.

    An empty cell stays None. A mapping gets None for each missing key, and keeps keys that the type does not name.
    """
    if value is None:
        return None
    if pa.types.is_list(kind):
        return [as_declared(entry, kind.value_type) for entry in value]
    if pa.types.is_struct(kind):
        return value | {field.name: as_declared(value.get(field.name), field.type) for field in kind}
    if pa.types.is_string(kind):
        return str(value)
    if pa.types.is_boolean(kind):
        return value in _TRUE
    if pa.types.is_integer(kind):
        return int(value)
    return float(value) if pa.types.is_floating(kind) else value


def shown(value: Any) -> str:
    """Returns the value as short text for a message."""
    text = repr(value[: _SHOWN + 1] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _is_whole(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    digits = value.strip().removeprefix("-")
    return digits.isdecimal() and len(digits) <= _MOST_DIGITS


def _is_float(value: float) -> bool:
    try:
        float(value)
    except OverflowError:
        return False
    return True


def split_fields(text: str) -> list[str]:
    """Splits the inside of `struct<...>` into its fields, at the commas outside brackets."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter == "<") - (letter == ">")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
