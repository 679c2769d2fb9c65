"""Errors that a user can act on.

Every one of them is one clear sentence: the value, what is legal, what to do. The command line prints it without a
traceback and exits with 2 (`UserError`) or 1 (`SystemFailure`). All of them cross Ray processes, so each keeps its
constructor's arguments in `__reduce__`: without it Ray hands the driver an `UnserializableException` instead.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


class ParcelrayError(Exception):
    """Base of all errors that parcelray raises on purpose."""


class UserError(ParcelrayError):
    """Something the user can mend: bad input, a missing file, an illegal value. Exit code 2."""


class SystemFailure(ParcelrayError):
    """Something that broke although the input was legal. Exit code 1."""


class UnsupportedBudgetError(UserError, ValueError):
    """A connector or reducer was asked for a number of visual tokens that it cannot produce.

    Args:
        num_visual_tokens: the budget that was asked for (visual tokens per image).
        supported: the legal budgets, ascending.
        connector: the name of the connector or reducer that refuses.
    """

    def __init__(self, num_visual_tokens: int, supported: Sequence[int], connector: str) -> None:
        self.num_visual_tokens = num_visual_tokens
        self.supported = tuple(supported)
        self.connector = connector
        super().__init__(
            f"{connector} cannot give {num_visual_tokens} visual tokens per image; legal budgets are"
            f" {describe_values(self.supported)}. Choose one of them, or another connector or routing."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.num_visual_tokens, self.supported, self.connector))


def describe_values(values: Sequence[int]) -> str:
    """Writes integers in short: an arithmetic progression as `16 to 256` (or `in steps of 2`), else a list."""
    if len(values) >= 4:
        step = values[1] - values[0]
        if step > 0 and all(b - a == step for a, b in pairwise(values)):
            return f"{values[0]} to {values[-1]}" + (f" in steps of {step}" if step > 1 else "")
    return ", ".join(str(value) for value in values)
