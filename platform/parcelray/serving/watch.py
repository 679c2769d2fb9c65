"""Sentences for the console of `parcelray serve`: which process of an endpoint died, and when it was replaced."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from parcelray.serving.app import INGRESS_DEPLOYMENT
from parcelray.serving.ingress.ingress import MODEL_DEPLOYMENT

_NAMES = {MODEL_DEPLOYMENT: "model replica", INGRESS_DEPLOYMENT: "ingress"}


class _Part(NamedTuple):
    """One group of equal processes."""

    name: str
    running: frozenset[str]
    """Ids of the processes that run."""
    target: int
    """Number of processes that should run."""


class DeathWatch:
    """Compares what runs with what ran before.

    Args:
        applications: names of the endpoint's Serve applications.
    """

    def __init__(self, applications: Collection[str]) -> None:
        self._applications = applications
        self._running: dict[str, frozenset[str]] = {}
        self._died_at: dict[str, list[float]] = {}

    def update(self, details: Mapping[str, Any], now: float) -> list[str]:
        """Returns the sentences about what happened since the last update.

        A process that stops because fewer are wanted is no death.

        Args:
            details: what runs, in the format of Serve's REST API.
            now: monotonic time in seconds.
        """
        sentences = []
        for key, part in self._parts(details):
            missing = max(0, part.target - len(part.running))
            gone = len(self._running.get(key, frozenset()) - part.running)
            died_at = self._died_at.setdefault(key, [])
            new = min(gone, missing - len(died_at))
            if new > 0:
                died_at += [now] * new
                sentences.append(f"{_count(new, part.name)} died; being replaced")
            while len(died_at) > missing:
                sentences.append(f"{part.name} died; replaced after {now - died_at.pop(0):.0f} s")
            self._running[key] = part.running
        return sentences

    def _parts(self, details: Mapping[str, Any]) -> Iterator[tuple[str, _Part]]:
        for name in self._applications:
            application = details["applications"].get(name, {})
            for deployment, each in application.get("deployments", {}).items():
                running = frozenset(
                    replica["replica_id"] for replica in each["replicas"] if replica["state"] == "RUNNING"
                )
                yield f"{name} {deployment}", _Part(_NAMES[deployment], running, each["target_num_replicas"])
        for node, proxy in details["proxies"].items():
            running = frozenset([str(proxy["actor_id"])] if proxy["status"] == "HEALTHY" else ())
            yield f"proxy {node}", _Part("proxy", running, 1)


def _count(count: int, name: str) -> str:
    return name if count == 1 else f"{count} {name}s"
