"""Files of one JSON object a line that only grow, and that a driver may be killed over."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from parcelray.errors import UserError

_Line = TypeVar("_Line")


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Adds a line; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, make: Callable[..., _Line], *, what: str, remedy: str) -> list[_Line]:
    """Reads a file, which need not be there. A last line that was cut off is left out, and cut from the file.

    Args:
        path: of the file.
        make: of a line's content, as keywords.
        what: a line is.
        remedy: what to do about one that is none.

    Raises:
        UserError: a line in the middle is something else.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(make(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                # The driver was killed while it wrote. Cut off, or the next line would be glued to it.
                with path.open("r+b") as file:
                    file.truncate(sum(len(each.encode()) for each in lines[:-1]))
                break
            raise UserError(f"{path}, line {number}, is no {what} ({error}); {remedy}.") from error
    return found
