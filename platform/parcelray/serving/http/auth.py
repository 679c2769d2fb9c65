"""API keys: a file of their hashes, compared in constant time, each with its own rate.

A line of the file is `SHA256 NAME REQUESTS_PER_MINUTE`. Keys are 256 random bits, so that a plain hash of them cannot
be guessed back.
"""

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from parcelray.errors import UserError
from parcelray.serving.http.api_errors import ApiError, too_many

DEFAULT_PER_MINUTE = 600
_PREFIX = "prk-"
_LINE = re.compile(r"(?P<hash>[0-9a-f]{64}) (?P<name>[\w.-]{1,64}) (?P<rate>[1-9]\d{0,6})")


@dataclass(frozen=True)
class ApiKey:
    """One line of the file."""

    hash: str
    """SHA-256 of the key."""
    name: str
    """Who has it."""
    per_minute: int
    """Requests it may make in a minute, in bursts of as many."""


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a file.

    Raises:
        UserError: it cannot be read, holds no key, or has a line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"keys file {path} cannot be read ({error}); make one with `parcelray keys add NAME --file {path}`."
        ) from None
    keys = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(
                f"keys file {path}, line {number}: is not of the form `SHA256 NAME REQUESTS_PER_MINUTE`; make it with"
                " `parcelray keys add`."
            )
        keys.append(ApiKey(match["hash"], match["name"], int(match["rate"])))
    if not keys:
        raise UserError(f"keys file {path} holds no key; make one with `parcelray keys add NAME --file {path}`.")
    return keys


def add_key(path: Path, name: str, per_minute: int = DEFAULT_PER_MINUTE) -> str:
    """Makes a key and appends its hash; the key itself is returned once and kept nowhere.

    Raises:
        UserError: the name or the rate is not legal, or the name is taken.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    line = f"{_hash(key)} {name} {per_minute}"
    if _LINE.fullmatch(line) is None:
        raise UserError(
            f"key name {name!r} at {per_minute} requests a minute is not legal; use letters, digits, '.', '_' and '-',"
            " and a rate from 1 on."
        )
    if path.exists() and any(known.name == name for known in read_keys(path)):
        raise UserError(f"keys file {path} has a key of {name} already; remove that line, or take another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    return key


def remove_key(path: Path, name: str) -> None:
    """Takes a key out of a file.

    Raises:
        UserError: the file cannot be read, or has no key of that name, or no other.
    """
    names = [key.name for key in read_keys(path)]
    if name not in names:
        raise UserError(f"keys file {path} has no key of {name}; it has those of {', '.join(names)}.")
    if len(names) == 1:
        raise UserError(
            f"{name} has the only key of {path}, and without one an endpoint does not start; add another key first."
        )
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if (match := _LINE.fullmatch(line.strip())) is None or match["name"] != name]
    # Written beside it and moved, so that an endpoint that reads the file meanwhile finds all of one or the other.
    new = path.with_name(f"{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(kept)
    new.replace(path)


class _Bucket:
    """A token bucket: full at the start, a minute's requests deep."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def take(self, now: float) -> float:
        """Seconds until a request is allowed; 0: this one is, and counts."""
        self._level = min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) * 60 / self.per_minute


class Gatekeeper:
    """Lets requests with a known key through, at the key's rate.

    Args:
        keys: all of them; none: everybody is let through.
        clock: seconds, monotonic.
    """

    def __init__(self, keys: list[ApiKey], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys: list[ApiKey] = []
        self._buckets: dict[str, _Bucket] = {}
        self.replace(keys)

    def replace(self, keys: list[ApiKey]) -> None:
        """Puts other keys in their place; who keeps name and rate keeps what is left of it."""
        now = self._clock()
        kept = self._buckets
        self._keys = keys
        self._buckets = {
            key.name: (
                kept[key.name]
                if key.name in kept and kept[key.name].per_minute == key.per_minute
                else _Bucket(key.per_minute, now)
            )
            for key in keys
        }

    def admit(self, authorization: str | None) -> str | None:
        """The name of the key's owner; None where no keys are asked for.

        Raises:
            ApiError: 401 without a known key, 429 beyond its rate.
        """
        if not self._keys:
            return None
        scheme, _, given = (authorization or "").partition(" ")
        owner = self._owner(given.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            problem = "The API key is not known" if authorization else "An API key is missing"
            raise ApiError(
                401,
                f"{problem}; send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        wait_s = self._buckets[owner.name].take(self._clock())
        if wait_s > 0:
            message = (
                f"This key may make {owner.per_minute} requests a minute; send the request again in {wait_s:.0f} s."
            )
            raise too_many(message, code="rate_limit_exceeded", retry_after_s=max(1, round(wait_s)))
        return owner.name

    def _owner(self, given: str) -> ApiKey | None:
        hashed = _hash(given)
        found = None
        # Every key is compared, so that the time tells neither which one fits nor whether any does.
        for key in self._keys:
            if hmac.compare_digest(key.hash, hashed):
                found = key
        return found


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
