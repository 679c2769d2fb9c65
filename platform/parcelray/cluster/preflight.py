"""Checks before a job is sent to a cluster: connection, authentication and version of Ray."""

import importlib.metadata
import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from functools import cache
from http.client import HTTPMessage
from typing import IO, Any

from parcelray.cluster.auth import auth_headers
from parcelray.errors import SystemFailure, UserError
from parcelray.loopback import is_loopback

TIMEOUT_S = 15.0

log = logging.getLogger(__name__)


def dashboard_url(address: str | None) -> str:
    """Resolves the dashboard of a cluster: the given address, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS.

    A given address always takes precedence. In Ray's own client the two variables override it, so that a job can reach
    another cluster than intended.

    Args:
        address: `http(s)://HOST:PORT`, or `HOST:PORT` for http; None: from the environment.

    Raises:
        UserError: there is no address, or it is not that of a dashboard (`ray://`, `auto`, `local`).
    """
    chosen = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not chosen:
        raise UserError(
            "No cluster address is set; give --address http://HOST:8265 (the Ray dashboard) or set"
            " RAY_API_SERVER_ADDRESS."
        )
    url = chosen if "://" in chosen else f"http://{chosen}"
    parts = urllib.parse.urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or chosen in ("auto", "local")
        or not parts.hostname
        or parts.username
        or parts.path not in ("", "/")
    ):
        raise UserError(
            f"{chosen} is not the address of a Ray dashboard; legal: http://HOST:PORT or https://HOST:PORT, for example"
            " http://127.0.0.1:8265."
        )
    return f"{parts.scheme}://{parts.netloc}"


def check_cluster(url: str, token: str | None) -> str:
    """Checks that a cluster responds, accepts the token and runs the same version of Ray as this machine.

    Args:
        url: URL of the dashboard, from `dashboard_url`.
        token: authentication token, from `find_token`.

    Returns:
        The version of Ray.

    Raises:
        UserError: the cluster is unreachable, rejects the token (401, 403) or runs another version of Ray.
    """
    version = cluster_version(url, token)
    check_version(version, local_ray_version())
    return version


def cluster_version(url: str, token: str | None) -> str:
    """Queries the version of Ray of a cluster; raises UserError if the cluster is unreachable or rejects the token."""
    return str(get_json(url, "/api/version", token)["ray_version"])


def local_ray_version() -> str:
    """Returns the version of Ray that is installed on this machine, without importing Ray."""
    return importlib.metadata.version("ray")


def check_version(cluster: str, local: str) -> None:
    """Raises UserError if two versions of Ray differ, as Ray guarantees no compatibility between versions."""
    if cluster != local:
        raise UserError(
            f"The cluster runs Ray {cluster} and this machine Ray {local}; install ray=={cluster} here or use a cluster"
            f" with Ray {local}."
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Rejects redirects, because urllib would send the token to the target of the redirect."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def get_json(url: str, path: str, token: str | None) -> dict[str, Any]:
    """Queries a path of a dashboard.

    Args:
        url: URL of the dashboard, from `dashboard_url`.
        path: path with its query, such as `/api/version`.
        token: authentication token, from `find_token`.

    Raises:
        UserError: nothing responds, the token is rejected, or the path is unknown.
        SystemFailure: the cluster failed on the request.
    """
    try:
        answer = json.loads(_response(url, path, token))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{url} responds, but not as a Ray dashboard; give the address that `ray start --head` prints."
        ) from error
    if not isinstance(answer, dict):
        raise SystemFailure(
            f"The response of {url}{path} is not a JSON object; the cluster may run another version of Ray."
        )
    return answer


def put_json(url: str, path: str, token: str | None, body: Mapping[str, Any]) -> None:
    """Puts a JSON object to a path of a dashboard; arguments and errors are those of `get_json`."""
    _response(url, path, token, json.dumps(body).encode())


@cache
def _warn_of_plain_http(host: str) -> None:
    """Warns once, not at each of many requests."""
    log.warning(
        "The token is sent unencrypted to %s; use https, or an SSH tunnel to the dashboard on the loopback address of"
        " the head node.",
        host,
    )


def _response(url: str, path: str, token: str | None, body: bytes | None = None) -> bytes:
    """Returns the body of the response to a GET, or with a body (JSON) to a PUT."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if token and url.startswith("http://") and not is_loopback(host):
        _warn_of_plain_http(host)
    content = {"Content-Type": "application/json"} if body is not None else {}
    request = urllib.request.Request(
        url + path, body, {**auth_headers(token), **content}, method="GET" if body is None else "PUT"
    )
    # Without proxies, a request to this machine stays on this machine, and its token too.
    handlers = [urllib.request.ProxyHandler({})] if is_loopback(host) else []
    try:
        with urllib.request.build_opener(_NoRedirect, *handlers).open(request, timeout=TIMEOUT_S) as response:
            answer: bytes = response.read()
    except urllib.error.HTTPError as error:
        raise _refusal(url, error.code) from error
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"Nothing responds at {url} ({reason}); check the address, and the SSH tunnel to the head node if its"
            " dashboard listens on the loopback address."
        ) from error
    return answer


def _refusal(url: str, code: int) -> UserError | SystemFailure:
    if code == 401:
        return UserError(
            f"The cluster at {url} requires a token (401) and none was found; set RAY_AUTH_TOKEN or"
            " RAY_AUTH_TOKEN_PATH, or write the token to ~/.ray/auth_token."
        )
    if code == 403:
        return UserError(
            f"The cluster at {url} does not accept this token (403); use the token of its head node (printed by `ray"
            " get-auth-token` there)."
        )
    if code < 500:
        return UserError(
            f"{url} responds with status {code} and not as a Ray dashboard; give the address that `ray start --head`"
            " prints."
        )
    return SystemFailure(f"The cluster at {url} responds with status {code}; see dashboard.log on its head node.")
