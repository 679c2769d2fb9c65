"""The result of one check of `parcelray doctor`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Literal, ParamSpec

from parcelray.errors import ParcelrayError

P = ParamSpec("P")
_MAX_LENGTH = 300


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """Name of the check."""
    status: Literal["pass", "warn", "fail", "skip"]
    """`warn`: usable with a limitation; `skip`: not configured. Only `fail` changes the exit code."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do; empty for `pass` and `skip`."""


def guarded(name: str, remedy: str) -> Callable[[Callable[P, Finding]], Callable[P, Finding]]:
    """Decorates a check so that an exception becomes a finding of status `fail`.

    Args:
        name: name of the check.
        remedy: what to do about an exception whose message does not say it.
    """

    def decorate(check: Callable[P, Finding]) -> Callable[P, Finding]:
        @wraps(check)
        def run(*args: P.args, **kwargs: P.kwargs) -> Finding:
            try:
                return check(*args, **kwargs)
            except ParcelrayError as error:
                # The project's messages name the problem first and the remedy after a semicolon.
                detail, _, own = str(error).partition("; ")
                return Finding(name, "fail", detail, own or remedy)
            except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the finding
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                reason = lines[0][:_MAX_LENGTH] if lines else "no message"
                return Finding(name, "fail", f"{type(error).__name__}: {reason}", remedy)

        return run

    return decorate
