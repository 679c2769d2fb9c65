"""Shared frame of the scripts in `pipelines/`: console, arguments, error messages and exit codes."""

from collections.abc import Callable, Sequence

from rich.console import Console

from parcelray.console import open_console
from parcelray.errors import ParcelrayError, UserError
from parcelray.files import explained_failure
from parcelray.loopback import bypass_proxies_on_loopback


def run_script(work: Callable[[Console], object]) -> int:
    """Runs a script and returns its exit code: 0 success, 2 user error, 1 system failure, 130 Ctrl-C."""
    console = open_console()
    bypass_proxies_on_loopback()
    try:
        work(console)
    except UserError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    except ParcelrayError as error:
        console.print(f"failed: {error}", markup=False)
        return 1
    except Exception as error:
        reason = explained_failure(error)
        if reason is None:
            raise
        console.print(f"failed: {reason}", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped. Finished work is kept; run the same command again to resume.", markup=False)
        return 130
    return 0


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """Returns the values of `--set a.b=c --set ...`.

    Raises:
        UserError: The arguments contain anything else.
    """
    if len(arguments) % 2 or any(flag != "--set" for flag in arguments[::2]):
        raise UserError(
            f"arguments are {' '.join(arguments)!r}; this pipeline takes only --set a.b=c, which may be repeated."
        )
    return list(arguments[1::2])


def split_count(overrides: Sequence[str], default: int) -> tuple[int, list[str]]:
    """Separates `count=NUMBER` from the other overrides; without it the count is the default.

    Raises:
        UserError: The count is not an integer of at least 1.
    """
    own = [each for each in overrides if each.startswith("count=")]
    count = own[-1].removeprefix("count=") if own else str(default)
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"count is {count!r}; it must be an integer of at least 1.")
    return int(count), [each for each in overrides if each not in own]
