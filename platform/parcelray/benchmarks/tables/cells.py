"""Turns the cells of a row into choices, correct answers, boxes and masks."""

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any

from parcelray.benchmarks.metrics.multiple_choice import LETTERS, options
from parcelray.benchmarks.tables.images import BadCell, image_size
from parcelray.benchmarks.tables.types import shown
from parcelray.config.benchmark import AnswersConfig, BoxConfig, PromptFamily, of_family

OPTION_FORMS = ("option_text", "option_letter")
"""Forms of a cell with the text of a choice."""
CHOICE_FORMS = ("choice_text", "choice_letter", *OPTION_FORMS)
"""Forms of a cell that names one of the choices, by its index or its text."""
"""Forms of answers whose cell is the position of a choice."""
_NUMBERS_OF_A_BOX = 4


def choices_of(columns: Sequence[str], cells: Mapping[str, Any]) -> list[str]:
    """Returns the choices by position. An empty one stays an empty text, so that the others keep their letters."""
    if len(columns) == 1:
        choices = ["" if choice is None else str(choice) for choice in _listed(cells[columns[0]])]
    else:
        choices = ["" if is_empty(cells[column]) else str(cells[column]) for column in columns]
    while choices and not choices[-1].strip():
        choices.pop()
    return choices


def without_nan(cell: Any) -> Any:
    """Returns None for NaN, which pandas writes into empty cells of any column."""
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def is_empty(cell: Any) -> bool:
    """Whether a cell has no text. Tables that pandas wrote have NaN, or its name, in empty cells."""
    return cell is None or str(cell).strip() in ("", "nan")


def _lettered(choices: Sequence[str]) -> dict[str, str]:
    try:
        return options(choices)
    except ValueError as error:
        raise BadCell(str(error)) from None


def option_text(field: str, choices: Sequence[str]) -> str:
    """Returns the text of an option field in a prompt. Empty choices are not shown."""
    match field:
        case "options_lines":
            return "\n".join(f"{letter}. {choice}" for letter, choice in _lettered(choices).items())
        case "options_inline":
            return ", ".join(f"({letter}) {choice}" for letter, choice in _lettered(choices).items())
    return " \t ".join(choice for choice in choices if choice.strip())


def _listed(value: Any) -> list[Any]:
    """Returns a list as it is, and parses a string that holds a Python list."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise BadCell(f"{shown(value)} is not a list") from None
    return _entries(value)


def _entries(value: Any) -> list[Any]:
    """Returns the entries of a list; an empty cell has none."""
    if not isinstance(value, list | tuple | None):
        raise BadCell(f"{shown(value)} is not a list")
    return list(value or ())


def numbers_of(values: Any) -> list[float]:
    """Returns the values as numbers.

    Raises:
        BadCell: a value is no number.
    """
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        raise BadCell(f"{shown(values)} does not consist of numbers") from None


def expected_answers(
    config: AnswersConfig, family: PromptFamily, value: Any, choices: Sequence[str]
) -> tuple[str, ...]:
    """Returns the correct answers in the form that the prompt of a family asks for; empty if there are none.

    Args:
        config: column and format of the answers.
        family: prompt family.
        value: cell of the column.
        choices: choices of the question by position; only `letter` and the forms in `CHOICE_FORMS` need them.

    Raises:
        BadCell: the cell names no choice, or its text is not a list.
    """
    form = of_family(config.form, family)
    match form:
        case "text":
            values = [value]
        case "letter":
            # A row without choices has an open question.
            values = [_letter(value, choices) if choices and not is_empty(value) else value]
        case "list":
            values = _entries(value)
        case "records":
            values = [None if record is None else record.get(config.field) for record in _entries(value)]
        case "literal":
            values = _listed(value)
        case "truth":
            values = [] if value is None else ["True" if value in (True, "True", "true", 1) else "False"]
        case "choice_text" | "choice_letter" | "option_text" | "option_letter":
            index = choice_index(form, value, choices)
            # `_lettered` raises if there are more choices than letters.
            values = [LETTERS[index] if form.endswith("letter") and _lettered(choices) else choices[index]]
    texts = ["" if answer is None else str(answer) for answer in values]
    if of_family(config.drop_empty, family):
        texts = [text for text in texts if text]
    template = of_family(config.template, family)
    return tuple(template.format(answer=text) for text in texts) if any(texts) else ()


def candidates(config: AnswersConfig, family: PromptFamily, choices: Sequence[str]) -> list[str]:
    """Returns the answer that names each choice in the form that the prompt of a family asks for."""
    by_letter = of_family(config.form, family) in ("letter", "choice_letter", "option_letter")
    template = of_family(config.template, family)
    names = _lettered(choices) if by_letter else [choice for choice in choices if choice.strip()]
    return [template.format(answer=name) for name in names]


def _letter(value: Any, choices: Sequence[str]) -> str:
    letter, named = str(value).strip().strip("()").upper(), _lettered(choices)
    if letter not in named:
        raise BadCell(f"{shown(value)} is not the letter of a choice; legal: {', '.join(named)}")
    return letter


def choice_index(form: str, value: Any, choices: Sequence[str]) -> int:
    """Returns the position of the correct choice.

    Args:
        form: one of `CHOICE_FORMS`.
        value: the cell.
        choices: choices of the question by position.

    Raises:
        BadCell: the cell names no choice, or the choice is empty.
    """
    if form in OPTION_FORMS:
        if value not in choices:
            raise BadCell(f"{shown(value)} is not a choice; legal: {', '.join(map(shown, choices))}")
        return choices.index(value)
    try:
        index = int(value)
    except (TypeError, ValueError, OverflowError):
        raise BadCell(f"{value!r} is not the index of a choice") from None
    if not 0 <= index < len(choices):
        raise BadCell(f"{index} is not the index of a choice; there are {len(choices)}")
    if not choices[index].strip():
        raise BadCell(f"the correct choice, {index}, is empty")
    return index


def box_of(config: BoxConfig, cells: Mapping[str, Any], image: bytes) -> tuple[float, float, float, float]:
    """Returns top, left, bottom, right as fractions of the image's sides."""
    value = cells[config.column]
    if not isinstance(value, list) or len(value) != _NUMBERS_OF_A_BOX:
        raise BadCell(f"{shown(value)} is not a box of four numbers")
    first, second, third, fourth = numbers_of(value)
    match config.form:
        case "xywh":
            left, top, right, bottom = first, second, first + third, second + fourth
        case "xyxy":
            left, top, right, bottom = first, second, third, fourth
        case "yxyx":
            top, left, bottom, right = first, second, third, fourth
    width, height = image_size(image) if config.unit == "pixels" else (1, 1)
    box = (top / height, left / width, bottom / height, right / width)
    if not (0 <= box[0] < box[2] <= 1.001 and 0 <= box[1] < box[3] <= 1.001):
        raise BadCell(f"the box {value} is empty or extends beyond the image")
    return (box[0], box[1], min(box[2], 1.0), min(box[3], 1.0))


def mask_of(value: Any, image: bytes) -> dict[str, Any]:
    """Returns the mask of a cell with the size of its image: polygons in pixels, or COCO run lengths.

    Raises:
        BadCell: the cell holds no mask.
    """
    width, height = image_size(image)
    if isinstance(value, dict):
        return {"size": [height, width]} | {key: part for key, part in value.items() if part is not None}
    if not isinstance(value, list) or not value:
        raise BadCell("no mask")
    polygons = value if isinstance(value[0], list) else [value]
    return {"size": [height, width], "polygons": [numbers_of(polygon) for polygon in polygons]}
