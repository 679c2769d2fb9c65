"""Images by https, where the operator allows hosts by name.

Off by default: a server that fetches what strangers name is a way into its network.

One expression reads the URL, and what it read is what is dialled: two parsers that disagree have let requests past such
lists. The name is resolved once, every address must be a public one, and the connection goes to the address that was
checked, so that a name that resolves otherwise the second time gains nothing. Redirects are refused.
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
"""From the look-up of the name to the last byte."""
_URL = re.compile(r"https://(?P<host>[a-z0-9.-]{1,253})(?P<target>/[\w.~!$&'()*+,;=:@%/?-]{0,2000})?", re.ASCII)
_PORT = 443
_CHUNK = 65536
_UNICAST = ipaddress.ip_network("2000::/3")
"""All that is routed of IPv6.

Outside lie the addresses that hold one of IPv4 (mapped, translated, NAT64) and the old site-local ones.
"""
_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")


class _PinnedConnection(http.client.HTTPSConnection):
    """Dials an address that was checked, asks it for the certificate of the name, and is over at a fixed time, whatever the other side sends.

    A context, at whose end its watchdog ends.
    """

    def __init__(self, host: str, address: str, deadline: float) -> None:
        self._tls = ssl.create_default_context()
        super().__init__(host, _PORT, context=self._tls)
        self._address = address
        self._deadline = deadline
        self._dialled: ssl.SSLSocket | None = None
        self._watchdog = threading.Timer(max(0.0, deadline - time.monotonic()), self._hang_up)
        self._watchdog.daemon = True

    def __enter__(self) -> "_PinnedConnection":
        self._watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        self.close()

    def connect(self) -> None:
        plain = socket.create_connection((self._address, _PORT), timeout=max(0.001, self._deadline - time.monotonic()))
        # The watchdog knows the socket before the handshake: a socket's own timeout starts again with each byte.
        self.sock = self._dialled = self._tls.wrap_socket(
            plain, server_hostname=self.host, do_handshake_on_connect=False
        )
        self._dialled.do_handshake()

    def _hang_up(self) -> None:
        if self._dialled is not None:
            # Not the TLS socket's own method, which takes its state away from the thread that reads. It may be closed
            # by now.
            with suppress(OSError):
                socket.socket.shutdown(self._dialled, socket.SHUT_RDWR)


def fetch_image(url: str, allowed_hosts: Collection[str], max_bytes: int, param: str) -> bytes:
    """The bytes at an https URL.

    Blocks, for `TIMEOUT_S` or as long as the look-up of the name takes: call it in a thread.

    Raises:
        ApiError: 403 where the host or its address is not allowed, 413 for too many bytes, 422 where nothing comes.
    """
    match = _URL.fullmatch(url)
    if match is None or match["host"] not in allowed_hosts:
        raise ApiError(
            403,
            f"{param} is not at a host that this server fetches from; send the image as data:image/png;base64,...",
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
            f"{param} was answered with status {response.status}; redirects are not followed.",
            code="image_not_fetched",
            param=param,
        )
    data = bytearray()
    while chunk := response.read1(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise ApiError(
                413, f"{param} is larger than {max_bytes / 1024**2:g} MiB.", code="image_too_large", param=param
            )
    return bytes(data)


def not_in_time(param: str) -> ApiError:
    """The refusal of an image that did not come."""
    return ApiError(422, f"{param} cannot be fetched within {TIMEOUT_S:g} s.", code="image_not_fetched", param=param)


def _public_address(host: str, param: str) -> str:
    """The first address of a host, all of which must be public ones."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, _PORT, type=socket.SOCK_STREAM)]
    except OSError:
        raise ApiError(
            422, f"{param} names a host that cannot be found.", code="image_not_fetched", param=param
        ) from None
    if not found or not all(is_public(address) for address in found):
        raise ApiError(403, f"{param} names a host inside a private network.", code="host", param=param)
    return found[0]


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet, and leads to no address of IPv4 that need not."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and (parsed not in _UNICAST or parsed in _SIX_TO_FOUR):
        return False
    return parsed.is_global and not parsed.is_multicast
