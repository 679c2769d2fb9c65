"""How many visual tokens a request's images get: fixed, as the request says, as the load allows, or by the input."""

from collections.abc import Callable
from time import monotonic

from parcelray.config.serve import (
    FixedPolicyConfig,
    InputPolicyConfig,
    LoadPolicyConfig,
    RequestPolicyConfig,
    ServedBudgets,
)
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.schemas import Detail
from parcelray.serving.ingress.load_controller import LoadController


class BudgetPolicy:
    """Decides the budget of each request among those offered.

    Args:
        budgets: of the job.
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

    def decide(self, asked: int | Detail) -> int:
        """The budget of one request.

        Raises:
            ApiError: 422 for a budget that is not offered.
        """
        if isinstance(self._config, FixedPolicyConfig):
            return self._fixed(self._config.visual_tokens, asked)
        if asked == "low":
            return self.offered[0]
        if asked == "high":
            return self.offered[-1]
        if asked == "auto":
            return self._open()
        if asked not in self.offered:
            raise ApiError(
                422,
                f"visual_tokens is {asked}; legal are {', '.join(map(str, self.offered))} and auto.",
                code="unsupported_budget",
                param="visual_tokens",
            )
        return asked

    def choices(self, asked: int | Detail) -> tuple[int, ...]:
        """Budgets that the replica chooses among for a request, ascending, `decide` being the largest; empty: `decide` has chosen."""
        if asked != "auto" or not isinstance(self._config, InputPolicyConfig):
            return ()
        floor = self._config.floor or self.offered[0]
        return tuple(budget for budget in self.offered if budget >= floor)

    def started(self) -> None:
        """A request went to its model."""
        if self.controller is not None:
            self.controller.started()

    def answered(self, latency_s: float, first_token_s: float) -> None:
        """It was answered; both from its arrival at the endpoint."""
        if self.controller is not None:
            measured = first_token_s if self._of_first_token else latency_s
            self.controller.answered(measured, latency_s - measured)

    def failed(self, waited_s: float, *, in_answer: bool) -> None:
        """It ended without an answer, or (`in_answer`) after its first token."""
        if self.controller is not None:
            self.controller.failed(0.0 if in_answer and self._of_first_token else waited_s)

    @property
    def _of_first_token(self) -> bool:
        return isinstance(self._config, LoadPolicyConfig) and self._config.measure == "first_token"

    def _open(self) -> int:
        if self.controller is not None:
            return self.controller.budget()
        if isinstance(self._config, InputPolicyConfig):
            return self.offered[-1]
        assert isinstance(self._config, RequestPolicyConfig)
        return self._config.auto or self.offered[-1]

    def _fixed(self, budget: int, asked: int | Detail) -> int:
        if isinstance(asked, int) and asked != budget:
            message = f"visual_tokens is {asked}, but this endpoint gives every image {budget}; leave it out."
            raise ApiError(422, message, code="unsupported_budget", param="visual_tokens")
        return budget
