"""The model versions of an endpoint, their shares of the requests, and the comparison of challenger and champion."""

import random
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from parcelray.config.reducer import ReducerConfig
from parcelray.config.serve import CanaryConfig
from parcelray.serving.engine.engine import PromptBuilder
from parcelray.serving.ingress.clients import ModelClient

if TYPE_CHECKING:
    from parcelray.profiling.reduction_flops import PrefillCost

_MAX_OUTCOMES = 500
"""Number of recent requests of each version that are compared."""


@dataclass
class Route:
    """One version of the model."""

    version: str
    """Pinned reference, as reported to clients."""
    client: ModelClient
    prompts: PromptBuilder
    costs: "dict[int, PrefillCost]"
    """Cost of one image at each offered budget."""
    share: float = 1.0
    """Share of the requests, 0 to 1; the champion gets the remaining share."""
    outcomes: deque[float | None] = field(default_factory=lambda: deque(maxlen=_MAX_OUTCOMES))
    """Latency of each recent request, seconds; None: it failed."""
    app: str = ""
    """Serve application that runs it; one version may run twice, with two connectors or reducers."""
    reducer: ReducerConfig | None = None
    """Training-free reducer of the model; None: none."""

    @property
    def reducer_settings(self) -> dict[str, Any] | None:
        """The settings of the reducer, as reported to clients."""
        return None if self.reducer is None else self.reducer.model_dump(mode="json")

    @property
    def error_rate(self) -> float:
        """Share of failed requests."""
        return sum(outcome is None for outcome in self.outcomes) / max(1, len(self.outcomes))

    @property
    def median_s(self) -> float:
        """Median latency of the answers, seconds."""
        answered = [outcome for outcome in self.outcomes if outcome is not None]
        return statistics.median(answered) if answered else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry of this version in `/version`."""
        return {
            "version": self.version,
            "reducer": self.reducer_settings,
            "share": self.share,
            "requests": len(self.outcomes),
            "error_rate": self.error_rate,
            "median_s": self.median_s,
        }


@dataclass
class Records:
    """Outcomes by application, kept across changes of routes: a rolled-back challenger must stay rolled back."""

    outcomes: dict[str, deque[float | None]] = field(default_factory=dict)
    rolled_back: dict[str, str] = field(default_factory=dict)
    """Reason why a challenger was rolled back."""


class Routes:
    """The champion and, during a canary, a challenger.

    Args:
        champion: gets every request that the challenger does not get.
        challenger: another version with a share of the requests; None: there is none.
        canary: limits beyond which the challenger is rolled back.
        records: outcomes from before this change of routes.
        rng: random generator that assigns requests to versions.
    """

    def __init__(
        self,
        champion: Route,
        challenger: Route | None = None,
        canary: CanaryConfig | None = None,
        *,
        records: Records | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.champion = champion
        self.challenger = challenger
        self._records = records or Records()
        for route in self.all:
            route.outcomes = self._records.outcomes.setdefault(route.app or route.version, route.outcomes)
        if challenger is not None:
            challenger.share = 0.0 if self.rolled_back is not None else challenger.share
            champion.share = 1.0 - challenger.share
        self._canary = canary
        self._rng = rng or random.Random()

    @property
    def all(self) -> list[Route]:
        """All versions, champion first."""
        return [self.champion] if self.challenger is None else [self.champion, self.challenger]

    @property
    def rolled_back(self) -> str | None:
        """Reason why the challenger was rolled back, or None."""
        return (
            None
            if self.challenger is None
            else self._records.rolled_back.get(self.challenger.app or self.challenger.version)
        )

    def pick(self) -> Route:
        """Returns the version that gets the next request."""
        if self.challenger is not None and self.rolled_back is None and self._rng.random() < self.challenger.share:
            return self.challenger
        return self.champion

    def record(self, route: Route, seconds: float | None) -> None:
        """Records the latency of a request (None: it failed) and rolls a worse challenger back."""
        route.outcomes.append(seconds)
        challenger = self.challenger
        if challenger is None or self._canary is None or self.rolled_back is not None:
            return
        reason = self._rollback_reason(challenger, self._canary)
        if reason is not None:
            self._records.rolled_back[challenger.app or challenger.version] = reason
            challenger.share, self.champion.share = 0.0, 1.0

    def _rollback_reason(self, challenger: Route, canary: CanaryConfig) -> str | None:
        """Returns why the challenger must be rolled back, or None if it may stay or too few requests were recorded."""
        champion = self.champion
        if len(challenger.outcomes) < canary.min_requests or len(champion.outcomes) < canary.min_requests:
            return None
        if challenger.error_rate > champion.error_rate + canary.max_error_rate:
            return (
                f"{challenger.error_rate:.1%} of its requests failed, but {champion.error_rate:.1%} of the champion's"
            )
        if challenger.median_s > canary.max_latency_ratio * champion.median_s:
            return (
                f"its median latency is {challenger.median_s * 1000:.0f} ms, the champion's is"
                f" {champion.median_s * 1000:.0f} ms"
            )
        return None
