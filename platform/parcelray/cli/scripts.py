"""What every script in `pipelines/` does around its work: a console, one sentence for a mistake, and the exit code."""

from collections.abc import Callable, Sequence

from rich.console import Console

from parcelray.console import open_console
from parcelray.errors import ParcelrayError, UserError


def run_script(work: Callable[[Console], object]) -> int:
    """Runs the work; 0: done, 2: a user's mistake, 1: a failure of the system, 130: Ctrl-C."""
    console = open_console()
    try:
        work(console)
    except UserError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    except ParcelrayError as error:
        console.print(f"failed: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped. What is finished is kept; the same command goes on.", markup=False)
        return 130
    return 0


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """The values of `--set a.b=c --set ...`.

    Raises:
        UserError: there is anything else.
    """
    if len(arguments) % 2 or any(flag != "--set" for flag in arguments[::2]):
        raise UserError(
            f"{' '.join(arguments)} is not understood; this pipeline takes only --set a.b=c, as often as you like."
        )
    return list(arguments[1::2])


def split_count(overrides: Sequence[str], default: int) -> tuple[int, list[str]]:
    """What `count=NUMBER` among overrides says, and the others; the default where it is not among them.

    Raises:
        UserError: it is no whole number from 1 on.
    """
    own = [each for each in overrides if each.startswith("count=")]
    count = own[-1].removeprefix("count=") if own else str(default)
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"count is {count!r}; legal is a whole number from 1 on.")
    return int(count), [each for each in overrides if each not in own]
