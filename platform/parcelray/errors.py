"""Errors that a user can act on.

Each message is short and complete: the wrong value, the legal values, and what to do. The command line prints it
without a traceback and exits with 2 (`UserError`) or 1 (`SystemFailure`). These errors cross Ray processes, so each
class with its own constructor defines `__reduce__`; without it, Ray raises `UnserializableException` in the driver.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


class ParcelrayError(Exception):
    """Base class of all errors that parcelray raises deliberately."""


class UserError(ParcelrayError):
    """An error that the user can fix: bad input, a missing file, a value that is not legal. Exit code 2."""


class SystemFailure(ParcelrayError):
    """A failure although the input was legal. Exit code 1."""


class NotFiniteError(SystemFailure):
    """A tensor of a model holds NaN or an infinite value, so there is no result for its input."""


class UnsupportedBudgetError(UserError, ValueError):
    """A connector or reducer does not support the requested number of visual tokens.

    Args:
        num_visual_tokens: the requested budget, in visual tokens per image.
        supported: the legal budgets in ascending order.
        connector: name of the connector or reducer.
    """

    def __init__(self, num_visual_tokens: int, supported: Sequence[int], connector: str) -> None:
        self.num_visual_tokens = num_visual_tokens
        self.supported = tuple(supported)
        self.connector = connector
        super().__init__(
            f"{connector} does not support {num_visual_tokens} visual tokens per image; legal budgets are"
            f" {describe_values(self.supported)}. Choose one of them, or another connector, routing or reducer."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.num_visual_tokens, self.supported, self.connector))


def describe_values(values: Sequence[int]) -> str:
    """Integers as short text: `16 to 256` or `16 to 256 in steps of 2` for an arithmetic progression, else a list."""
    if len(values) >= 4:
        step = values[1] - values[0]
        if step > 0 and all(b - a == step for a, b in pairwise(values)):
            return f"{values[0]} to {values[-1]}" + (f" in steps of {step}" if step > 1 else "")
    return ", ".join(str(value) for value in values)
