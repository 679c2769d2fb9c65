"""Checks before anything is sent to a cluster: it answers, it lets us in, it runs our version of Ray, it has what the job needs."""

import importlib.metadata
import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPMessage
from typing import IO, Any

from parcelray.cluster.auth import auth_headers, find_token
from parcelray.errors import SystemFailure, UserError

TIMEOUT_S = 15.0
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

log = logging.getLogger(__name__)


def dashboard_url(address: str | None) -> str:
    """Resolves the dashboard of a cluster: the address given, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS.

    Ray's own client lets the two variables win over its argument, so that a job can reach another cluster than the one
    named; here the address given always wins.

    Args:
        address: `http(s)://HOST:PORT`, or `HOST:PORT` for http; None: from the environment.

    Raises:
        UserError: no address, or one that is not the dashboard's (`ray://`, `auto`, `local`).
    """
    found = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not found:
        raise UserError(
            "No cluster was named; give --address http://HOST:8265 (the Ray dashboard) or set RAY_API_SERVER_ADDRESS."
        )
    url = found if "://" in found else f"http://{found}"
    parts = urllib.parse.urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or found in ("auto", "local")
        or not parts.hostname
        or parts.username
        or parts.path not in ("", "/")
    ):
        raise UserError(
            f"{found} is not the address of a Ray dashboard; legal is http://HOST:PORT or https://HOST:PORT, as in"
            " http://127.0.0.1:8265."
        )
    return f"{parts.scheme}://{parts.netloc}"


def check_cluster(url: str, token: str | None) -> str:
    """Checks that a cluster answers, lets us in and runs our version of Ray.

    Args:
        url: what `dashboard_url` returned.
        token: what `find_token` returned.

    Returns:
        The version of Ray on both sides.

    Raises:
        UserError: unreachable, refused (401, 403) or another version.
    """
    version = cluster_version(url, token)
    check_version(version, local_ray_version())
    return version


def cluster_version(url: str, token: str | None) -> str:
    """Asks a dashboard for its version of Ray; raises as `check_cluster` does."""
    return str(_get(url, "/api/version", token)["ray_version"])


def cluster_resources(address: str | None) -> dict[str, float]:
    """What all living nodes of a cluster have in total, used or not, as Ray counts it (`CPU`, `GPU`, `memory` in bytes, ...).

    Args:
        address: as in `dashboard_url`.
    """
    url = dashboard_url(address)
    answer = _get(
        url, "/api/v0/nodes?detail=1&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE", find_token()
    )
    total: dict[str, float] = {}
    for node in answer["data"]["result"]["result"]:
        for name, amount in (node["resources_total"] or {}).items():
            total[name] = total.get(name, 0.0) + float(amount)
    return total


def local_ray_version() -> str:
    """The version of Ray installed here, read without importing Ray."""
    return importlib.metadata.version("ray")


def check_version(cluster: str, local: str) -> None:
    """Raises UserError when two versions of Ray differ; Ray promises nothing between versions."""
    if cluster != local:
        raise UserError(
            f"The cluster runs Ray {cluster} and this machine Ray {local}; install ray=={cluster} here or name a"
            f" cluster with Ray {local}."
        )


def check_resources(need: Mapping[str, float], available: Mapping[str, float]) -> None:
    """Refuses a request that could never be met: Ray itself would wait for ever, without a word.

    Args:
        need: resources in Ray's names and units, for example `{"CPU": 5, "GPU": 4}`.
        available: the cluster's totals, from `cluster_resources` or `ray.cluster_resources()`; with an autoscaler, its
            upper limits.

    Raises:
        UserError: names every resource that is short, with both numbers.
    """
    short = [
        f"{name} {amount:g} (there: {available.get(name, 0.0):g})"
        for name, amount in sorted(need.items())
        if amount > available.get(name, 0.0)
    ]
    if short:
        raise UserError(
            f"The cluster is too small for this job; it needs {', '.join(short)}. Lower the job's resources or add"
            " nodes."
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would carry the token along to wherever a redirect points."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def _get(url: str, path: str, token: str | None) -> dict[str, Any]:
    host = urllib.parse.urlsplit(url).hostname
    if token and url.startswith("http://") and host not in _LOOPBACK:
        log.warning(
            "The token travels unencrypted to %s; prefer https, or an SSH tunnel to the dashboard on the head's"
            " loopback.",
            host,
        )
    request = urllib.request.Request(url + path, headers=auth_headers(token))
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise _refusal(url, error.code) from error
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"Nothing answers at {url} ({reason}); check the address, and the tunnel to the head if its dashboard is on"
            " loopback."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{url} answers, but not as a Ray dashboard; legal is the address that `ray start --head` prints."
        ) from error
    if not isinstance(answer, dict):
        raise SystemFailure(
            f"{url}{path} answered with something that is not an object; the cluster may run another version of Ray."
        )
    return answer


def _refusal(url: str, code: int) -> UserError | SystemFailure:
    if code == 401:
        return UserError(
            f"The cluster at {url} wants a token (401) and none was found; set RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or"
            " write it to ~/.ray/auth_token."
        )
    if code == 403:
        return UserError(
            f"The cluster at {url} does not accept this token (403); take the one of its head node (`ray"
            " get-auth-token` there)."
        )
    if code < 500:
        return UserError(
            f"{url} answers with status {code}, not as a Ray dashboard; legal is the address that `ray start --head`"
            " prints."
        )
    return SystemFailure(f"The cluster at {url} answers with status {code}; see dashboard.log on its head node.")
