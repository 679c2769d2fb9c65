"""API keys: a file of key hashes, which are compared in constant time, each with its own rate limit.

A line of the file is `SHA256 NAME REQUESTS_PER_MINUTE`. Keys have 256 random bits, so a plain hash cannot be
reversed by guessing.
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
    """One line of the keys file."""

    hash: str
    """SHA-256 of the key."""
    name: str
    """Name of the owner."""
    per_minute: int
    """Rate limit in requests per minute; also the largest burst."""


def read_keys(path: Path) -> list[ApiKey]:
    """Reads a keys file.

    Raises:
        UserError: the file cannot be read, has no key, or has an invalid line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"keys file {path} cannot be read ({error}); create it with `parcelray keys add NAME --file {path}`."
        ) from None
    keys = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(
                f"keys file {path}, line {number}: not of the form `SHA256 NAME REQUESTS_PER_MINUTE`; add keys with"
                " `parcelray keys add`."
            )
        keys.append(ApiKey(match["hash"], match["name"], int(match["rate"])))
    if not keys:
        raise UserError(f"keys file {path} contains no key; add one with `parcelray keys add NAME --file {path}`.")
    return keys


def add_key(path: Path, name: str, per_minute: int = DEFAULT_PER_MINUTE) -> str:
    """Creates a key and appends its hash to the file. The key itself is returned and not stored.

    Raises:
        UserError: the name or the rate is not legal, or the name exists already.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    line = f"{_hash(key)} {name} {per_minute}"
    if _LINE.fullmatch(line) is None:
        raise UserError(
            f"key name {name!r} with {per_minute} requests per minute is not legal; use 1 to 64 letters, digits, '.',"
            " '_' and '-', and a rate from 1 to 9999999."
        )
    if path.exists() and any(known.name == name for known in read_keys(path)):
        raise UserError(
            f"keys file {path} already has a key named {name}; remove that key first, or choose another name."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    return key


def remove_key(path: Path, name: str) -> None:
    """Removes a key from a file.

    Raises:
        UserError: the file cannot be read, has no key of that name, or has only this key.
    """
    names = [key.name for key in read_keys(path)]
    if name not in names:
        raise UserError(f"keys file {path} has no key named {name}; it has {', '.join(names)}.")
    if len(names) == 1:
        raise UserError(
            f"{name} is the only key in {path}, and an endpoint does not start without a key; add another key first."
        )
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if (match := _LINE.fullmatch(line.strip())) is None or match["name"] != name]
    # Written to a temporary file and renamed, so that an endpoint never reads a partially written file.
    new = path.with_name(f"{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(kept)
    new.replace(path)


class _Bucket:
    """A token bucket that holds one minute of requests and starts full."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def take(self, now: float) -> float:
        """Takes a token if there is one and returns 0; else returns the seconds until the next token."""
        self._level = min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) * 60 / self.per_minute


class Gatekeeper:
    """Admits requests with a known key, within the rate limit of the key.

    Args:
        keys: all legal keys; empty: every request is admitted.
        clock: monotonic clock in seconds.
    """

    def __init__(self, keys: list[ApiKey], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys: list[ApiKey] = []
        self._buckets: dict[str, _Bucket] = {}
        self.replace(keys)

    def replace(self, keys: list[ApiKey]) -> None:
        """Replaces the keys. A key with unchanged name and rate keeps the level of its bucket."""
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
        """Checks a request and returns the name of the key's owner; None if no keys are required.

        Args:
            authorization: value of the Authorization header.

        Raises:
            ApiError: 401 without a known key, 429 above the rate limit of the key.
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
            message = f"This key is limited to {owner.per_minute} requests per minute; retry in {wait_s:.0f} s."
            raise too_many(message, code="rate_limit_exceeded", retry_after_s=max(1, round(wait_s)))
        return owner.name

    def _owner(self, given: str) -> ApiKey | None:
        hashed = _hash(given)
        owner = None
        # All keys are compared, so that the time does not reveal which key matches, or whether one does.
        for key in self._keys:
            if hmac.compare_digest(key.hash, hashed):
                owner = key
        return owner


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
