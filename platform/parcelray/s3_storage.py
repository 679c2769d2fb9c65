"""S3 storage that repeats requests until a deadline while the store cannot be reached or rejects them.

The libraries alone do not bridge an outage. botocore counts attempts, and a store that refuses connections ends them in
no time. s3fs repeats neither refused connections nor listings.
"""

import logging
import random
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import ConnectionError as UnreachableError
from botocore.exceptions import HTTPClientError, SSLError
from s3fs import S3FileSystem

from parcelray.errors import SystemFailure

logger = logging.getLogger(__name__)

_PATIENCE_S = 120.0
"""Time from the first failure of a request until it is given up, seconds."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_WARN_AFTER_S = 5.0
_WARN_PERIOD_S = 30.0
_UNAVAILABLE = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP status codes of a store that is overloaded or restarts."""
_TIMED_OUT = "RequestTimeout"
"""S3's error code of an upload that stalled; its status is 400."""

# Not the generator of the module, on whose state the results of a training may depend.
_random = random.Random()
_warned_at = 0.0


class PatientS3FileSystem(S3FileSystem):  # type: ignore[misc]
    """The file system of s3fs with the retries of this module for all its requests; see there for the arguments."""

    def __init__(self, *args: Any, config_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        single = {"retries": {"mode": "standard", "total_max_attempts": 1}}
        super().__init__(*args, config_kwargs={**(config_kwargs or {}), **single}, **kwargs)

    async def set_session(self, refresh: bool = False, kwargs: Mapping[str, Any] = {}) -> Any:
        """Called by s3fs before each request; returns the client."""
        client = await super().set_session(refresh, kwargs)
        # A second registration under the same id changes nothing.
        client.meta.events.register_last("needs-retry.s3", _pause, unique_id="parcelray-retry")
        client.meta.events.register("before-send.s3", _send_body_at_once, unique_id="parcelray-send")
        return client


def _send_body_at_once(request: Any, **_: Any) -> None:
    """Removes the header with which a client waits, without a time limit, until the store accepts an upload."""
    request.headers.pop("Expect", None)


def _pause(
    request_dict: dict[str, Any], attempts: int, response: Any = None, caught_exception: Any = None, **_: Any
) -> float | None:
    """Returns the pause before the next attempt of a request, seconds; None: the request is not repeated.

    Args:
        request_dict: botocore's description of the request.
        attempts: number of attempts so far.
        response: the HTTP response and its parsed content; None: there was none.
        caught_exception: the error of the HTTP client; None: there was a response.

    Raises:
        SystemFailure: the request has failed for too long.
    """
    global _warned_at
    reason = _failure(response, caught_exception)
    if reason is None:
        return None
    now = time.monotonic()
    waited = now - request_dict["context"].setdefault("parcelray_failing_since", now)
    parts = urlsplit(request_dict["url"])
    store = f"the object storage at {parts.scheme}://{parts.netloc}"
    if waited > _PATIENCE_S:
        raise SystemFailure(
            f"{store} has not answered for {waited:.0f} s ({reason}); check that it runs, its address"
            " (AWS_ENDPOINT_URL) and the network, then run the same command again."
        ) from caught_exception
    if waited >= _WARN_AFTER_S and now - _warned_at > _WARN_PERIOD_S:
        _warned_at = now
        logger.warning("%s does not answer (%s); trying again for %.0f s", store, reason, _PATIENCE_S - waited)
    # The random part spreads the requests of many workers.
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(attempts - 1, 10)) * _random.uniform(0.5, 1.0)


def _failure(response: Any, error: Any) -> str | None:
    """Returns why a request failed in a way that may pass by itself; None: it succeeded, or failed for good."""
    if error is not None:
        # A certificate that is not accepted stays so.
        may_pass = isinstance(error, UnreachableError | HTTPClientError) and not isinstance(error, SSLError)
        return (str(error).splitlines() or [type(error).__name__])[0] if may_pass else None
    http, parsed = response
    code = (parsed or {}).get("Error", {}).get("Code", "")
    return f"{http.status_code} {code}".rstrip() if http.status_code in _UNAVAILABLE or code == _TIMED_OUT else None
