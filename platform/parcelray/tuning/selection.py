"""`max retention subject to tokens <= 64`: which finished trial is wanted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parcelray.errors import UserError

_FORM = "max METRIC subject to METRIC <= NUMBER and METRIC >= NUMBER"
_SELECTION = re.compile(r"(?P<mode>max|min)\s+(?P<metric>\S+)(?:\s+subject\s+to\s+(?P<limits>.+))?")
_LIMIT = re.compile(r"(?P<metric>\S+?)\s*(?P<sign><=|>=)\s*(?P<value>[-+.\deE]+)")


@dataclass(frozen=True)
class Limit:
    """A metric's bound."""

    metric: str
    at_most: bool
    value: float

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Whether a trial keeps it."""
        found = metrics.get(self.metric, float("nan"))
        return found <= self.value if self.at_most else found >= self.value

    def __str__(self) -> str:
        return f"{self.metric} {'<=' if self.at_most else '>='} {self.value:g}"


@dataclass(frozen=True)
class Selection:
    """Best value of a metric under limits on others."""

    metric: str
    largest: bool
    limits: tuple[Limit, ...] = ()

    def choose(self, trials: Sequence[Mapping[str, float]]) -> int:
        """Index of the trial; the first of equal ones.

        Raises:
            UserError: a metric was not measured, or no trial keeps the limits.
        """
        measured = sorted({name for trial in trials for name in trial})
        for name in (self.metric, *(limit.metric for limit in self.limits)):
            if name not in measured:
                raise UserError(
                    f"--select names {name!r}, which no finished trial measured; measured:"
                    f" {', '.join(measured) or 'nothing yet'}."
                )
        legal = [
            index
            for index, trial in enumerate(trials)
            if self.metric in trial and all(limit.holds(trial) for limit in self.limits)
        ]
        if not legal:
            ends = [
                f"{limit.metric} is {_range([trial[limit.metric] for trial in trials if limit.metric in trial])}"
                for limit in self.limits
            ]
            raise UserError(
                f"No finished trial has {' and '.join(map(str, self.limits))}; {', '.join(ends)}. Loosen the limit, or"
                " go on searching."
            )
        return max(legal, key=lambda index: trials[index][self.metric] * (1 if self.largest else -1))


def parse_selection(text: str) -> Selection:
    """Reads a selection.

    Raises:
        UserError: it has another form.
    """
    match = _SELECTION.fullmatch(text.strip())
    limits = []
    for part in re.split(r"\s+and\s+|\s*,\s*", match["limits"].strip()) if match and match["limits"] else ():
        found = _LIMIT.fullmatch(part)
        try:
            limits.append(Limit(found["metric"], found["sign"] == "<=", float(found["value"])) if found else None)
        except ValueError:
            limits.append(None)
    if match is None or None in limits:
        raise UserError(f"--select is {text!r}; write {_FORM}, for example: max retention subject to tokens <= 64.")
    return Selection(match["metric"], match["mode"] == "max", tuple(limit for limit in limits if limit is not None))


def _range(values: Sequence[float]) -> str:
    return f"{min(values):g} to {max(values):g} in the finished trials" if values else "unknown"
