"""Images by https, where the operator allows hosts by name. Off by default: a server that fetches what strangers name is a way into its network.

One expression reads the URL, and what it read is what is dialled: two parsers that disagree have let requests past such lists. The name is
resolved once, every address must be a public one, and the connection goes to the address that was checked, so that a name that resolves
otherwise the second time gains nothing. Redirects are refused.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Collection

from parcelray.serving.api_errors import ApiError

TIMEOUT_S = 5.0
_URL = re.compile(r"https://(?P<host>[a-z0-9.-]{1,253})(?P<target>/[\w.~!$&'()*+,;=:@%/?-]{0,2000})?", re.ASCII)
_CHUNK = 65536


class _PinnedConnection(http.client.HTTPSConnection):
    """Dials an address that was checked, and asks it for the certificate of the name."""

    def __init__(self, host: str, address: str) -> None:
        super().__init__(host, 443, timeout=TIMEOUT_S, context=ssl.create_default_context())
        self._address = address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, 443), timeout=TIMEOUT_S)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


def fetch_image(url: str, allowed_hosts: Collection[str], max_bytes: int, param: str) -> bytes:
    """The bytes at an https URL. Blocks: call it in a thread.

    Raises:
        ApiError: 403 where the host or its address is not allowed, 413 for too many bytes, 422 where nothing comes.
    """
    match = _URL.fullmatch(url)
    if match is None or match["host"] not in allowed_hosts:
        raise ApiError(403, f"{param} is not at a host that this server fetches from; send the image as data:image/png;base64,...", code="host", param=param)
    host = match["host"]
    connection = _PinnedConnection(host, _public_address(host, param))
    deadline = time.monotonic() + TIMEOUT_S
    try:
        connection.request("GET", match["target"] or "/", headers={"accept": "image/*", "user-agent": "parcelray"})
        response = connection.getresponse()
        if response.status != 200:
            raise ApiError(422, f"{param} was answered with status {response.status}; redirects are not followed.", code="image_not_fetched", param=param)
        data = bytearray()
        while chunk := response.read(_CHUNK):
            data += chunk
            if len(data) > max_bytes:
                raise ApiError(413, f"{param} is larger than {max_bytes / 1024**2:g} MiB.", code="image_too_large", param=param)
            if time.monotonic() > deadline:
                raise TimeoutError
        return bytes(data)
    except (OSError, http.client.HTTPException):
        raise ApiError(422, f"{param} cannot be fetched within {TIMEOUT_S:g} s.", code="image_not_fetched", param=param) from None
    finally:
        connection.close()


def _public_address(host: str, param: str) -> str:
    """The first address of a host, all of which must be public ones."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]
    except OSError:
        raise ApiError(422, f"{param} names a host that cannot be found.", code="image_not_fetched", param=param) from None
    if not found or not all(is_public(address) for address in found):
        raise ApiError(403, f"{param} names a host inside a private network.", code="host", param=param)
    return found[0]


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return parsed.is_global and not parsed.is_multicast
