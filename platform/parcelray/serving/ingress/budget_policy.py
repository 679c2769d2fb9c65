"""Decides the visual-token budget of a request: fixed, as requested, by the load, or by the input."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

from parcelray.config.serve import (
    FixedPolicyConfig,
    InputPolicyConfig,
    LoadPolicyConfig,
    RequestPolicyConfig,
    ServedBudgets,
)
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.schemas import Detail

_MAX_PATIENCE = 16
"""Maximum factor by which the configured pause before a step up grows."""


class BudgetPolicy:
    """Decides the budget of each request among the offered ones.

    Args:
        budgets: the job's budgets and policy.
        clock: seconds, monotonic.
    """

    def __init__(self, budgets: ServedBudgets, clock: Callable[[], float] = monotonic) -> None:
        self.offered = tuple(sorted(budgets.offered))
        self._config = budgets.policy
        self.controller: LoadController | None = None
        if isinstance(self._config, LoadPolicyConfig):
            floor = self._config.floor or self.offered[0]
            self.controller = LoadController(
                self._config, [budget for budget in self.offered if budget >= floor], clock
            )

    def decide(self, requested: int | Detail) -> int:
        """Returns the budget of one request.

        Raises:
            ApiError: 422 for a budget that is not offered.
        """
        if isinstance(self._config, FixedPolicyConfig):
            return self._fixed(self._config.visual_tokens, requested)
        if requested == "low":
            return self.offered[0]
        if requested == "high":
            return self.offered[-1]
        if requested == "auto":
            return self._auto()
        if requested not in self.offered:
            raise ApiError(
                422,
                f"visual_tokens is {requested}; legal are {', '.join(map(str, self.offered))} and auto.",
                code="unsupported_budget",
                param="visual_tokens",
            )
        return requested

    def choices(self, requested: int | Detail) -> tuple[int, ...]:
        """Returns the budgets, ascending, among which the replica chooses; empty if `decide` has chosen.

        The budget that `decide` returns is the largest of them.
        """
        if requested != "auto" or not isinstance(self._config, InputPolicyConfig):
            return ()
        floor = self._config.floor or self.offered[0]
        return tuple(budget for budget in self.offered if budget >= floor)

    def started(self) -> None:
        """Records that a request was sent to its model."""
        if self.controller is not None:
            self.controller.started()

    def answered(self, latency_s: float, first_token_s: float) -> None:
        """Records that a request was answered; both times are from its arrival at the endpoint, seconds."""
        if self.controller is not None:
            measured = first_token_s if self._measures_first_token else latency_s
            self.controller.answered(measured, latency_s - measured)

    def failed(self, waited_s: float, *, in_answer: bool) -> None:
        """Records that a request ended without an answer, or (`in_answer`) after its first token."""
        if self.controller is not None:
            self.controller.failed(0.0 if in_answer and self._measures_first_token else waited_s)

    @property
    def _measures_first_token(self) -> bool:
        return isinstance(self._config, LoadPolicyConfig) and self._config.measure == "first_token"

    def _auto(self) -> int:
        if self.controller is not None:
            return self.controller.budget()
        if isinstance(self._config, InputPolicyConfig):
            return self.offered[-1]
        assert isinstance(self._config, RequestPolicyConfig)
        return self._config.auto or self.offered[-1]

    def _fixed(self, budget: int, requested: int | Detail) -> int:
        if isinstance(requested, int) and requested != budget:
            message = f"visual_tokens is {requested}, but this endpoint uses {budget} for every image; leave it out."
            raise ApiError(422, message, code="unsupported_budget", param="visual_tokens")
        return budget


class _End(NamedTuple):
    """The end of a request."""

    at: float
    latency_s: float
    """The measured latency; for an aborted request a lower bound."""
    after_s: float
    """Time from the measured moment to the end of the answer, seconds."""
    answered: bool


class LoadController:
    """Keeps a latency objective by moving along the budgets, one step at a time.

    The larger of two estimates is compared with the objective:

    - the quantile of recent latencies;
    - the expected latency of a request that starts now: requests in flight divided by answers per second (Little's
      law). It reacts to a burst before any of its requests has ended.

    Refused requests count in neither, because under load there are many, and they end at once. Steps down are fast,
    with a pause between them. Steps up are slow, and each one that came too early doubles the pause, so that the budget
    does not oscillate.

    Args:
        config: objective and pauses.
        ladder: budgets to choose from, ascending.
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
        self._created = now
        self._changed = now
        self._calm_since = now
        self._raised = -math.inf
        self._patience = 1
        self._lowered_steps = 0
        self._raised_steps = 0

    def started(self) -> None:
        """Records that a request was sent to its model."""
        self._in_flight += 1

    def answered(self, latency_s: float, after_s: float = 0.0) -> None:
        """Records that a request was answered.

        Args:
            latency_s: the measured latency, seconds.
            after_s: from the measured moment to the end of the answer, seconds; not 0 if the first token is measured.
        """
        self._in_flight = max(0, self._in_flight - 1)
        self._ends.append(_End(self._clock(), latency_s, after_s, answered=True))

    def failed(self, waited_s: float) -> None:
        """Records that a request ended without an answer; it counts if it waited longer than the objective."""
        self._in_flight = max(0, self._in_flight - 1)
        if waited_s > self._config.objective_s:
            self._ends.append(_End(self._clock(), waited_s, 0.0, answered=False))

    def budget(self) -> int:
        """Returns the visual tokens per image of a request that leaves the choice open."""
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
        """Returns the number of steps down and up since the last call."""
        steps = (self._lowered_steps, self._raised_steps)
        self._lowered_steps = self._raised_steps = 0
        return steps

    def _lower(self, now: float) -> None:
        # A step up was too early if it did not last longer than the pause before it.
        early = now - self._raised < 2 * self._config.raise_after_s * self._patience
        self._patience = min(self._patience * 2, _MAX_PATIENCE) if early else 1
        self._level -= 1
        self._lowered_steps += 1
        self._changed = now

    def _latency(self, now: float) -> float:
        # Latencies before the last step belong to another budget.
        recent = sorted(end.latency_s for end in self._ends if end.at >= self._changed)
        quantile = recent[min(len(recent) - 1, math.floor(self._config.quantile * len(recent)))] if recent else 0.0
        answers = [end for end in self._ends if end.answered]
        expected = 0.0
        if answers and self._in_flight > 1:
            rate = len(answers) / min(self._config.window_s, max(now - self._created, 1e-3))
            expected = self._in_flight / rate - sum(end.after_s for end in answers) / len(answers)
        return max(quantile, expected)
