"""Tests of the budget policies, the load policy on a simulated server."""

import heapq
import itertools

import pytest

from parcelray.config.serve import LoadPolicyConfig, ServedBudgets
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.ingress.budget_policy import BudgetPolicy

LADDER = (16, 64, 128, 256)


class Simulation:
    """A server that answers one request at a time, with a duration proportional to the budget."""

    def __init__(self, policy: LoadPolicyConfig) -> None:
        self.now = 0.0
        self.policy = BudgetPolicy(ServedBudgets(offered=LADDER, policy=policy), clock=lambda: self.now)
        self.latencies: list[tuple[float, float]] = []
        self.budgets: list[tuple[float, int]] = []
        self.decode_s = 0.0
        """Time after the first token; it does not delay other requests."""
        self._free_at = 0.0
        self._ends: list[tuple[float, float]] = []

    def run(self, rate: float, seconds: float, refusals: float = 0.0) -> None:
        """Sends requests at an even rate, each 4 ms plus 0.25 ms per visual token, and `refusals` per second."""
        end = self.now + seconds
        arrival = self.now
        while arrival < end:
            while self._ends and self._ends[0][0] <= arrival:
                self._end(*heapq.heappop(self._ends))
            self.now = arrival
            budget = self.policy.decide("auto")
            self.policy.started()
            for _ in range(round(refusals / rate)):
                self.policy.started()
                self.policy.failed(0.001, in_answer=False)
            self.budgets.append((arrival, budget))
            self._free_at = max(self._free_at, arrival) + 0.004 + 0.00025 * budget
            heapq.heappush(self._ends, (self._free_at + self.decode_s, arrival))
            arrival += 1 / rate

    def _end(self, at: float, arrived: float) -> None:
        self.now = at
        self.latencies.append((at, at - arrived))
        self.policy.answered(at - arrived, at - arrived - self.decode_s)

    def p95(self, start: float) -> float:
        latencies = sorted(latency for at, latency in self.latencies if at >= start)
        return latencies[int(0.95 * len(latencies))]


def test_low_load_gets_the_largest_budget() -> None:
    simulation = Simulation(LoadPolicyConfig(objective_s=0.5))
    simulation.run(rate=2, seconds=30)
    assert {budget for _, budget in simulation.budgets} == {256}


def test_the_objective_holds_under_a_load_too_high_for_the_largest_budget() -> None:
    simulation = Simulation(LoadPolicyConfig(objective_s=0.5))
    simulation.run(rate=5, seconds=10)
    simulation.run(rate=60, seconds=60)  # the limit is 14.7 requests per second at 256 tokens and 125 at 16 tokens
    assert simulation.p95(start=30) <= 0.5
    fixed = Simulation(LoadPolicyConfig(objective_s=1e6))
    fixed.run(rate=60, seconds=60)
    assert fixed.p95(start=30) > 10


def test_refusals_do_not_count_as_answers() -> None:
    """Refusals, which are many under load, would make a full queue look short if they counted as answers."""
    now = [0.0]
    for refused in (0, 50):
        policy = BudgetPolicy(
            ServedBudgets(offered=LADDER, policy=LoadPolicyConfig(objective_s=1.0, raise_after_s=1)),
            clock=lambda: now[0],
        )
        for _ in range(40):
            policy.started()
        for tick in range(200):
            now[0] += 0.1
            if tick % 2:  # five answers per second and as many new requests: 8 s of work in flight
                policy.answered(0.3, 0.3)
                policy.started()
            for _ in range(refused // 10):
                policy.started()
                policy.failed(0.001, in_answer=False)
            budget = policy.decide("auto")
        assert budget == 16


def test_the_objective_holds_with_many_refusals() -> None:
    simulation = Simulation(LoadPolicyConfig(objective_s=0.5))
    simulation.run(rate=5, seconds=10, refusals=50)
    simulation.run(rate=60, seconds=60, refusals=300)
    assert simulation.p95(start=30) <= 0.5


def test_disconnected_clients_count_as_latency() -> None:
    """If no client waits long enough for an answer, their waiting time is the only latency."""
    now = [0.0]
    policy = BudgetPolicy(ServedBudgets(offered=LADDER, policy=LoadPolicyConfig(objective_s=1.0)), clock=lambda: now[0])
    for _ in range(40):
        now[0] += 0.2
        policy.started()
        policy.failed(2.0, in_answer=False)
        budget = policy.decide("auto")
    assert budget == 16


def test_long_answers_do_not_count_as_wait_for_the_first_token() -> None:
    simulation = Simulation(LoadPolicyConfig(objective_s=0.5, measure="first_token"))
    simulation.decode_s = 5.0
    simulation.run(rate=10, seconds=60)  # 50 in flight, but each has its first token after 68 ms
    assert simulation.budgets[-1][1] == 256
    simulation.run(rate=60, seconds=60)
    assert simulation.budgets[-1][1] < 256


def test_the_budget_rises_again_after_the_load() -> None:
    simulation = Simulation(LoadPolicyConfig(objective_s=0.5, raise_after_s=2))
    simulation.run(rate=60, seconds=20)
    assert simulation.budgets[-1][1] < 256
    simulation.run(rate=2, seconds=120)
    assert simulation.budgets[-1][1] == 256


def test_the_budget_does_not_oscillate() -> None:
    simulation = Simulation(LoadPolicyConfig(objective_s=0.5, raise_after_s=2))
    simulation.run(rate=30, seconds=300)
    late = [budget for at, budget in simulation.budgets if at > 100]
    changes = sum(a != b for a, b in itertools.pairwise(late))
    assert changes <= 12, "at most one step per 16 seconds"


def test_the_budget_never_falls_below_the_floor() -> None:
    simulation = Simulation(LoadPolicyConfig(objective_s=0.05, floor=64))
    simulation.run(rate=200, seconds=20)
    assert min(budget for _, budget in simulation.budgets) == 64


@pytest.mark.parametrize(("requested", "expected"), [("low", 16), ("high", 256), (64, 64)])
def test_a_requested_budget_is_not_changed_by_load(requested: int | str, expected: int) -> None:
    simulation = Simulation(LoadPolicyConfig(objective_s=0.001))
    simulation.run(rate=100, seconds=10)
    assert simulation.policy.decide(requested) == expected  # type: ignore[arg-type]


def test_the_policies_by_request_and_fixed() -> None:
    by_request = BudgetPolicy(
        ServedBudgets.model_validate({"offered": LADDER, "policy": {"type": "request", "auto": 64}})
    )
    assert [by_request.decide(requested) for requested in ("auto", "low", "high", 128)] == [64, 16, 256, 128]
    fixed = BudgetPolicy(
        ServedBudgets.model_validate({"offered": LADDER, "policy": {"type": "fixed", "visual_tokens": 64}})
    )
    assert [fixed.decide(requested) for requested in ("auto", "low", "high", 64)] == [64, 64, 64, 64]
    with pytest.raises(ApiError, match="64"):
        fixed.decide(128)


@pytest.mark.parametrize(
    "policy", [{"type": "fixed", "visual_tokens": 32}, {"type": "load", "floor": 17}, {"type": "request", "auto": 1}]
)
def test_a_policy_may_only_name_offered_budgets(policy: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not in offered; legal: 16, 64, 128, 256"):
        ServedBudgets.model_validate({"offered": LADDER, "policy": policy})
