"""Loopback addresses: requests to this machine must not go to a proxy, which would also receive their tokens."""

import ipaddress
import os

_BYPASSED = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1")
_VARIABLES = ("no_proxy", "NO_PROXY")


def is_loopback(host: str) -> bool:
    """Whether a host name or address without its port is this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def bypass_proxies_on_loopback() -> None:
    """Exempts loopback addresses from the proxies that the environment names, for this process and its children.

    The HTTP clients of Ray and MLflow choose the proxy themselves, from `http_proxy`, `all_proxy` and `no_proxy`.
    Other hosts keep their proxy.
    """
    named = next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), "")
    hosts = [host.strip() for host in named.split(",") if host.strip()]
    if "*" in hosts:
        return
    text = ",".join([*hosts, *(host for host in _BYPASSED if host not in hosts)])
    os.environ.update(dict.fromkeys(_VARIABLES, text))
