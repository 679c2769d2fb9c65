"""Downloads images by https from hosts that the operator allows by name. Off by default.

A server that fetches arbitrary URLs gives access to its internal network (server-side request forgery). The defences:
- One regular expression parses the URL and gives the host for the connection, so two parsers cannot disagree.
- The name is resolved once. Every address must be public, and the connection uses the checked address, so a second
  DNS answer has no effect.
- Redirects are refused.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Collection
from contextlib import suppress

from parcelray.serving.http.api_errors import ApiError

TIMEOUT_S = 5.0
"""Time limit of a download in seconds, from the DNS lookup to the last byte."""
_URL = re.compile(r"https://(?P<host>[a-z0-9.-]{1,253})(?P<target>/[\w.~!$&'()*+,;=:@%/?-]{0,2000})?", re.ASCII)
_PORT = 443
_CHUNK = 65536
_UNICAST = ipaddress.ip_network("2000::/3")
"""All publicly routed IPv6 addresses.

Addresses that embed an IPv4 address (mapped, translated, NAT64) and the old site-local addresses lie outside.
"""
_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")


class _PinnedConnection(http.client.HTTPSConnection):
    """Connects to a checked address, verifies the certificate of the host name, and closes at a fixed deadline.

    A watchdog timer enforces the deadline even if the host keeps sending. It stops when the context is left.
    """

    def __init__(self, host: str, address: str, deadline: float) -> None:
        self._tls = ssl.create_default_context()
        super().__init__(host, _PORT, context=self._tls)
        self._address = address
        self._deadline = deadline
        self._connected: ssl.SSLSocket | None = None
        self._watchdog = threading.Timer(max(0.0, deadline - time.monotonic()), self._close_socket)
        self._watchdog.daemon = True

    def __enter__(self) -> "_PinnedConnection":
        self._watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        self.close()

    def connect(self) -> None:
        plain = socket.create_connection((self._address, _PORT), timeout=max(0.001, self._deadline - time.monotonic()))
        # The watchdog gets the socket before the handshake, because a socket timeout restarts with each byte.
        self.sock = self._connected = self._tls.wrap_socket(
            plain, server_hostname=self.host, do_handshake_on_connect=False
        )
        self._connected.do_handshake()

    def _close_socket(self) -> None:
        if self._connected is not None:
            # Not the method of the TLS socket, which would remove its state while another thread reads. The socket may
            # be closed already.
            with suppress(OSError):
                socket.socket.shutdown(self._connected, socket.SHUT_RDWR)


def fetch_image(url: str, allowed_hosts: Collection[str], max_bytes: int, param: str) -> bytes:
    """Downloads the bytes at an https URL.

    Blocks for up to `TIMEOUT_S`, or for as long as the DNS lookup takes: call it in a thread.

    Raises:
        ApiError: 403 if the host or its address is not allowed, 413 for too many bytes, 422 if the download fails.
    """
    match = _URL.fullmatch(url)
    if match is None or match["host"] not in allowed_hosts:
        raise ApiError(
            403,
            f"{param} is not at a host that this server allows; send the image as data:image/png;base64,...",
            code="host",
            param=param,
        )
    host = match["host"]
    deadline = time.monotonic() + TIMEOUT_S
    address = _public_address(host, param)
    headers = {"accept": "image/*", "user-agent": "parcelray", "connection": "close"}
    try:
        with _PinnedConnection(host, address, deadline) as connection:
            connection.request("GET", match["target"] or "/", headers=headers)
            with connection.getresponse() as response:
                data = _read(response, max_bytes, param)
                if time.monotonic() > deadline or response.length:
                    raise TimeoutError
                return data
    except (OSError, http.client.HTTPException):
        raise not_in_time(param) from None


def _read(response: http.client.HTTPResponse, max_bytes: int, param: str) -> bytes:
    if response.status != 200:
        raise ApiError(
            422,
            f"The host of {param} answered with status {response.status}; legal is 200, redirects are not followed.",
            code="image_not_fetched",
            param=param,
        )
    data = bytearray()
    while chunk := response.read1(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise ApiError(
                413,
                f"{param} is larger than {max_bytes / 1024**2:g} MiB; send a smaller image.",
                code="image_too_large",
                param=param,
            )
    return bytes(data)


def not_in_time(param: str) -> ApiError:
    """Returns the error for an image that could not be downloaded in time."""
    return ApiError(
        422,
        f"{param} cannot be downloaded within {TIMEOUT_S:g} s; send the image as data:image/png;base64,...",
        code="image_not_fetched",
        param=param,
    )


def _public_address(host: str, param: str) -> str:
    """Returns the first address of a host. All its addresses must be public."""
    try:
        addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, _PORT, type=socket.SOCK_STREAM)]
    except OSError:
        raise ApiError(
            422, f"{param} has a host name that cannot be resolved.", code="image_not_fetched", param=param
        ) from None
    if not addresses or not all(is_public(address) for address in addresses):
        raise ApiError(
            403, f"{param} has a host with a private address; legal are public hosts.", code="host", param=param
        )
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is public and does not embed an IPv4 address."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and (parsed not in _UNICAST or parsed in _SIX_TO_FOUR):
        return False
    return parsed.is_global and not parsed.is_multicast
