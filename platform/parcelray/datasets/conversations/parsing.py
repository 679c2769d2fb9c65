"""Rows of conversations in LLaVA's format and as OpenAI's messages: their images and turns, or why they have none."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from parcelray.models.backbones.processor_base import Turn

IMAGE_MARKER = "<image>"
"""Stands for an image in the text of a question."""
_AROUND_MARKER = re.compile(r"\s*<image>\s*")
_QUESTION, _ANSWER, _SYSTEM = "question", "answer", "system"
_ROLES = {
    "human": _QUESTION,
    "user": _QUESTION,
    "gpt": _ANSWER,
    "assistant": _ANSWER,
    "system": _SYSTEM,
    "developer": _SYSTEM,
}
_IMAGE_PARTS = ("image", "image_url", "input_image")

ImageSource = str | bytes
"""A name, a URI, or the encoded image itself."""


class BadRow(Exception):
    """A row that gives no conversation; the message is the reason."""


class Conversation(NamedTuple):
    """A row with its images, which all precede the text, and its turns."""

    id: str | None
    images: list[ImageSource]
    turns: list[Turn]


def parse_conversation(row: Mapping[str, Any]) -> Conversation:
    """Reads a row with the key `conversations` (LLaVA: `from`, `value`) or `messages` (OpenAI: `role`, `content`).

    The images are in `image` or `images`, or in the parts of messages. As in LLaVA, markers are removed from the text
    and the images precede it. Instructions of the role `system` precede the first question.

    Raises:
        BadRow: the row has no turns, no answer, or more markers than images.
    """
    images = _images([row.get(key) for key in ("image", "images")])
    messages = row.get("conversations") if row.get("conversations") is not None else row.get("messages")
    if not _is_list(messages) or not len(messages):
        raise BadRow("neither conversations nor messages")
    markers = 0
    parts: list[tuple[str, str]] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise BadRow(f"turn {number} is not an object")
        role = _ROLES.get(str(message.get("from", message.get("role"))))
        if role is None:
            raise BadRow(
                f"turn {number} is from {message.get('from', message.get('role'))!r}; legal: {', '.join(_ROLES)}"
            )
        text, own = _content(message.get("value", message.get("content")), number)
        images += own
        if role != _ANSWER:
            # A part with an image needs no marker in the text.
            markers += text.count(IMAGE_MARKER) + len(own)
            text = _AROUND_MARKER.sub(" ", text)
        parts.append((role, text.strip()))
    if markers > len(images):
        raise BadRow(f"{markers} {IMAGE_MARKER} markers, but {len(images)} images")
    return Conversation(row_id(row), images, _turns(parts))


def parse_question(row: Mapping[str, Any], images: Sequence[str], prompt: str, answer: str) -> Conversation:
    """Reads a row with one question, from its columns.

    Args:
        row: cells by column.
        images: columns with an image or a list of images.
        prompt: template of the question, with columns in braces.
        answer: column of the answer; of a list of answers, the first is learned.

    Raises:
        BadRow: a column is empty.
    """
    try:
        question = prompt.format_map({name: "" if cell is None else cell for name, cell in row.items()}).strip()
    except (KeyError, IndexError, AttributeError) as error:
        raise BadRow(f"the prompt uses {error}, which is not a column") from None
    cell = row.get(answer)
    if _is_list(cell):
        cell = cell[0] if len(cell) else None
    text = "" if cell is None else str(cell).strip()
    if not text:
        raise BadRow("no answer")
    return Conversation(row_id(row), _images([row.get(name) for name in images]), [Turn(question, text)])


def row_id(row: Mapping[str, Any]) -> str | None:
    """Returns the id of a row as text; None if it has none."""
    return None if row.get("id") is None else str(row["id"])


def _turns(parts: Sequence[tuple[str, str]]) -> list[Turn]:
    instructions = [text for role, text in parts if role == _SYSTEM]
    spoken = [(role, text) for role, text in parts if role != _SYSTEM]
    turns = []
    for number in range(0, len(spoken), 2):
        role, question = spoken[number]
        if role != _QUESTION:
            raise BadRow("an answer without a question before it")
        if number + 1 == len(spoken) or spoken[number + 1][0] != _ANSWER or not spoken[number + 1][1]:
            raise BadRow("no answer")
        turns.append(Turn(question, spoken[number + 1][1]))
    if not turns:
        raise BadRow("no answer")
    if instructions:
        turns[0] = turns[0]._replace(question="\n".join([*instructions, turns[0].question]).strip())
    return turns


def _content(content: Any, number: int) -> tuple[str, list[ImageSource]]:
    """Text and images of a message: a text, or a list of parts."""
    if isinstance(content, str):
        return content, []
    if not _is_list(content):
        raise BadRow(f"turn {number} has no text")
    texts: list[str] = []
    images: list[ImageSource] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _IMAGE_PARTS:
            # Arrow fills the keys of the other kinds with nulls; an image in a column of the row has no value here.
            value = next(
                (part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None), None
            )
            if value is None:
                texts.append(IMAGE_MARKER)
            images += _images([value])
        else:
            raise BadRow(f"turn {number} has a part of type {kind!r}; legal: text, {', '.join(_IMAGE_PARTS)}")
    return "\n".join(texts), images


def _images(cells: Sequence[Any]) -> list[ImageSource]:
    """Flattens cells of images: a name, bytes, a mapping with `bytes`, `path` or `url`, or a list of these."""
    images: list[ImageSource] = []
    for cell in cells:
        if cell is None or (isinstance(cell, str) and not cell):
            continue
        if _is_list(cell):
            if any(each is None for each in cell):
                raise BadRow("an image is null")
            images += _images(cell)
        elif isinstance(cell, str | bytes):
            images.append(cell)
        elif isinstance(cell, Mapping):
            value = next((cell[key] for key in ("bytes", "path", "url") if cell.get(key)), None)
            if not isinstance(value, str | bytes):
                raise BadRow("an image without bytes and without a path")
            images.append(value)
        else:
            raise BadRow(f"an image of type {type(cell).__name__}")
    return images


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
