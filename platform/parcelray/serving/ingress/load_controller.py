"""Holds a latency objective by choosing how many visual tokens an image is worth while the load lasts.

Two signals, of which the worse one counts: the quantile of the latencies that were seen lately, and the latency that a
request starting now must expect, which is how many are in flight over how many are answered in a second (Little's law).
The second one sees a burst before any request of it has ended. Refusals say nothing about either: under pressure there
are many, and they end at once. Down is quick, a step at a time with a pause between; up is slow, and slower each time
that it proved too early, so that the budget does not swing.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from parcelray.config.serve import LoadPolicyConfig

_MOST_PATIENT = 16
"""The pause before a step up grows to so many times its configured length at most."""


class _End(NamedTuple):
    """A request that left."""

    at: float
    latency_s: float
    """What the objective is about; of one that was given up at least so much."""
    after_s: float
    """From there to the end of the answer."""
    answered: bool


class LoadController:
    """One step of a ladder of budgets at a time.

    Args:
        config: objective and pauses.
        ladder: budgets it may give, ascending.
        clock: seconds, monotonic.
    """

    def __init__(self, config: LoadPolicyConfig, ladder: Sequence[int], clock: Callable[[], float]) -> None:
        self._config = config
        self._ladder = tuple(ladder)
        self._level = len(ladder) - 1
        self._clock = clock
        self._in_flight = 0
        self._ends: deque[_End] = deque()
        now = clock()
        self._born = now
        self._changed = now
        self._calm_since = now
        self._raised = -math.inf
        self._patience = 1
        self._lowered = 0
        self._raised_steps = 0

    def started(self) -> None:
        """A request went to its model."""
        self._in_flight += 1

    def answered(self, latency_s: float, after_s: float = 0.0) -> None:
        """It was answered.

        Args:
            latency_s: what the objective is about.
            after_s: from there to the end of the answer, where the objective is about the first token.
        """
        self._in_flight = max(0, self._in_flight - 1)
        self._ends.append(_End(self._clock(), latency_s, after_s, answered=True))

    def failed(self, waited_s: float) -> None:
        """It ended without an answer; one that has waited for longer than the objective was too slow whatever would have come of it."""
        self._in_flight = max(0, self._in_flight - 1)
        if waited_s > self._config.objective_s:
            self._ends.append(_End(self._clock(), waited_s, 0.0, answered=False))

    def budget(self) -> int:
        """Visual tokens of a request that leaves the choice open."""
        now = self._clock()
        while self._ends and self._ends[0].at < now - self._config.window_s:
            self._ends.popleft()
        latency_s = self._latency(now)
        if latency_s > self._config.objective_s:
            self._calm_since = now
            if self._level > 0 and now - self._changed >= self._config.lower_after_s:
                self._lower(now)
        elif latency_s > self._config.raise_below * self._config.objective_s:
            self._calm_since = now
        elif (
            self._level < len(self._ladder) - 1
            and now - max(self._calm_since, self._changed) >= self._config.raise_after_s * self._patience
        ):
            self._level += 1
            self._raised_steps += 1
            self._raised = self._changed = now
        return self._ladder[self._level]

    def new_steps(self) -> tuple[int, int]:
        """Steps down and up since this was asked last."""
        found = (self._lowered, self._raised_steps)
        self._lowered = self._raised_steps = 0
        return found

    def _lower(self, now: float) -> None:
        # A step up that does not last longer than the pause before it was too early.
        early = now - self._raised < 2 * self._config.raise_after_s * self._patience
        self._patience = min(self._patience * 2, _MOST_PATIENT) if early else 1
        self._level -= 1
        self._lowered += 1
        self._changed = now

    def _latency(self, now: float) -> float:
        # Latencies from before the last step say what another budget costs.
        seen = sorted(end.latency_s for end in self._ends if end.at >= self._changed)
        quantile = seen[min(len(seen) - 1, math.floor(self._config.quantile * len(seen)))] if seen else 0.0
        answers = [end for end in self._ends if end.answered]
        expected = 0.0
        if answers and self._in_flight > 1:
            rate = len(answers) / min(self._config.window_s, max(now - self._born, 1e-3))
            expected = self._in_flight / rate - sum(end.after_s for end in answers) / len(answers)
        return max(quantile, expected)
