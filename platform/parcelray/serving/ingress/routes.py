"""Which model versions an endpoint has, what share of the requests each gets, and whether a challenger does as well as the champion."""

import random
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from parcelray.config.serve import CanaryConfig
from parcelray.profiling.flops import CostBreakdown
from parcelray.serving.ingress.clients import ModelClient
from parcelray.serving.ingress.prompting import PromptBuilder

_KEPT = 500
"""Requests of each version that are compared."""


@dataclass
class Route:
    """One version of the model."""

    version: str
    """Pinned reference, as it is reported."""
    client: ModelClient
    prompts: PromptBuilder
    costs: dict[int, CostBreakdown]
    """Of one image at each offered budget."""
    share: float = 1.0
    """Of the requests; the champion gets what the others leave."""
    outcomes: deque[float | None] = field(default_factory=lambda: deque(maxlen=_KEPT))
    """Seconds of each answer; None: it failed."""
    app: str = ""
    """Application that runs it: one version may run twice, with two connectors."""

    @property
    def error_rate(self) -> float:
        """Share of failed requests."""
        return sum(outcome is None for outcome in self.outcomes) / max(1, len(self.outcomes))

    @property
    def median_s(self) -> float:
        """Median latency of its answers."""
        answered = [outcome for outcome in self.outcomes if outcome is not None]
        return statistics.median(answered) if answered else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For `/version`."""
        return {
            "version": self.version,
            "share": self.share,
            "requests": len(self.outcomes),
            "error_rate": self.error_rate,
            "median_s": self.median_s,
        }


@dataclass
class Records:
    """How versions did, by application; outlives a change of routes, since a challenger that was sent away must not come back with it."""

    outcomes: dict[str, deque[float | None]] = field(default_factory=dict)
    rolled_back: dict[str, str] = field(default_factory=dict)
    """Why a challenger was sent away."""


class Routes:
    """The champion, and a challenger where there is one.

    Args:
        champion: gets every request that the challenger does not.
        challenger: None: there is none.
        canary: when the challenger is sent away.
        records: what is known of them from before.
        rng: draws who gets a request.
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
        """Champion first."""
        return [self.champion] if self.challenger is None else [self.champion, self.challenger]

    @property
    def rolled_back(self) -> str | None:
        """Why the challenger was sent away; None: it was not."""
        return (
            None
            if self.challenger is None
            else self._records.rolled_back.get(self.challenger.app or self.challenger.version)
        )

    def pick(self) -> Route:
        """Who gets the next request."""
        if self.challenger is not None and self.rolled_back is None and self._rng.random() < self.challenger.share:
            return self.challenger
        return self.champion

    def record(self, route: Route, seconds: float | None) -> None:
        """How a request ended; None: it failed. A challenger that does worse gets no more."""
        route.outcomes.append(seconds)
        challenger = self.challenger
        if challenger is None or self._canary is None or self.rolled_back is not None:
            return
        reason = self._verdict(challenger, self._canary)
        if reason is not None:
            self._records.rolled_back[challenger.app or challenger.version] = reason
            challenger.share, self.champion.share = 0.0, 1.0

    def _verdict(self, challenger: Route, canary: CanaryConfig) -> str | None:
        """Why the challenger must go; None: it may stay, or it is too early to say."""
        champion = self.champion
        if len(challenger.outcomes) < canary.min_requests or len(champion.outcomes) < canary.min_requests:
            return None
        if challenger.error_rate > champion.error_rate + canary.max_error_rate:
            return f"{challenger.error_rate:.1%} of its requests failed, of the champion's {champion.error_rate:.1%}"
        if challenger.median_s > canary.max_latency_ratio * champion.median_s:
            return (
                f"its median latency is {challenger.median_s * 1000:.0f} ms, the champion's"
                f" {champion.median_s * 1000:.0f} ms"
            )
        return None
