"""Checks of `parcelray doctor --security`: listening addresses, file modes, keys, secrets in files, and versions."""

import importlib.metadata
import ipaddress
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.version import Version

from parcelray.cluster.auth import MODE_VARIABLE, TOKEN_PATH_VARIABLE
from parcelray.cluster.package import find_secret
from parcelray.doctor.finding import Finding, guarded
from parcelray.serving.http.auth import read_keys

_RUNS_CODE = {8265: "the Ray dashboard", 10001: "the Ray client server", 5000: "MLflow"}
"""Ports by default of programs that run code, or show all runs, for whoever reaches them."""
_LISTENING = "0A"
_CREDENTIALS = re.compile(rb"://[^/@\s:]+:[^/@\s]+@")
"""User and password in a URL."""
_OLDEST_SAFE = {"ray": "2.54", "mlflow": "3.11", "torch": "2.6"}
"""Oldest versions without the known vulnerabilities: CVE-2026-27482, CVE-2026-2614 and -2652, CVE-2025-32434."""


@guarded("listening addresses", "list the open ports with `ss -ltn`")
def check_binds(endpoint_ports: Iterable[int], net: Path = Path("/proc/net")) -> Finding:
    """Finds programs that listen on other addresses than the loopback.

    Args:
        endpoint_ports: ports of endpoints, which need API keys.
        net: folder with the tables `tcp` and `tcp6` of Linux.
    """
    ports = _RUNS_CODE | dict.fromkeys(endpoint_ports, "an endpoint")
    exposed = {
        port: f"{ports[port]} on {address}:{port}"
        for table in ("tcp", "tcp6")
        for address, port in _listening(net / table)
        if port in ports and not address.is_loopback
    }
    if not exposed:
        return Finding("listening addresses", "pass", "no known port is open to other machines")
    return Finding(
        "listening addresses",
        "fail" if exposed.keys() & _RUNS_CODE.keys() else "warn",
        f"open to other machines: {', '.join(exposed.values())}",
        "listen on 127.0.0.1 and use an SSH tunnel; an endpoint for others needs http.keys_file",
    )


def _listening(table: Path) -> Iterable[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    """Yields address and port of each listening socket of a table of Linux."""
    lines = table.read_text().splitlines()[1:] if table.is_file() else []
    for line in lines:
        _, local, _, state, *_ = line.split()
        if state == _LISTENING:
            address, _, port = local.partition(":")
            # Each group of 32 bits is in the byte order of the machine, which is little-endian.
            groups = [bytes.fromhex(address[index : index + 8])[::-1] for index in range(0, len(address), 8)]
            yield ipaddress.ip_address(b"".join(groups)), int(port, 16)


@guarded("file modes", "check that HOME and the storage can be read")
def check_modes(keys_file: Path, storage: str) -> Finding:
    """Finds secrets that other users can read, and files that they can change.

    Args:
        keys_file: hashes of the API keys of an endpoint.
        storage: folder or URI of runs.
    """
    home = Path.home()
    token = Path(os.environ.get(TOKEN_PATH_VARIABLE) or home / ".ray" / "auth_token").expanduser()
    hub = Path(os.environ.get("HF_TOKEN_PATH") or home / ".cache" / "huggingface" / "token").expanduser()
    secrets = [token, hub, home / ".aws" / "credentials"]
    # Whoever can write to runs can replace the state of a search, which Ray unpickles.
    owned = [keys_file, *([Path(storage)] if "://" not in storage else [])]
    wrong = {
        path: f"chmod {'go=' if hidden else 'go-w'} {path}"
        for hidden, paths in ((True, secrets), (False, owned))
        for path in paths
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & (0o077 if hidden else 0o022)
    }
    if wrong:
        names = ", ".join(map(str, wrong))
        return Finding("file modes", "fail", f"open to other users: {names}", " && ".join(wrong.values()))
    return Finding("file modes", "pass", "tokens, keys and runs are closed to other users")


@guarded("API keys", "add keys with `parcelray keys add`")
def check_keys(keys_file: Path) -> Finding:
    """Reads the file of API keys.

    Args:
        keys_file: hashes of the keys.
    """
    if not keys_file.exists():
        return Finding("API keys", "skip", f"there is no {keys_file}")
    return Finding("API keys", "pass", f"keys in {keys_file}: {len(read_keys(keys_file))}, as hashes")


@guarded("secrets in files", "make the job files readable")
def check_secrets(files: Iterable[Path]) -> Finding:
    """Searches job files for tokens, private keys, and URLs with a password.

    Args:
        files: the files.
    """
    checked = [path for path in files if path.is_file()]
    found = [str(path) for path in checked if _has_secret(path.read_bytes())]
    if found:
        return Finding(
            "secrets in files",
            "fail",
            f"text that looks like a secret: {', '.join(found)}",
            "remove it, set it as an environment variable of the cluster, and revoke it if it was ever shared",
        )
    return Finding("secrets in files", "pass", f"none in {len(checked)} job files")


def _has_secret(content: bytes) -> bool:
    return find_secret(content) or _CREDENTIALS.search(content) is not None


@guarded("Ray's token", "unset RAY_AUTH_MODE, or set it to token")
def check_token_mode(environment: Mapping[str, str] = os.environ) -> Finding:
    """Checks that authentication is not switched off in this environment.

    Args:
        environment: environment variables.
    """
    if environment.get(MODE_VARIABLE, "").lower() == "disabled":
        return Finding(
            "Ray's token",
            "fail",
            f"{MODE_VARIABLE}=disabled: everyone who reaches Ray's ports can run code",
            f"unset {MODE_VARIABLE}, or set it to token",
        )
    return Finding("Ray's token", "pass", "authentication is not switched off")


@guarded("known vulnerabilities", "install the versions of requirements.lock")
def check_vulnerabilities() -> Finding:
    """Compares installed versions with the oldest ones without known vulnerabilities."""
    old = [
        f"{name} {version} is older than {oldest}"
        for name, oldest in _OLDEST_SAFE.items()
        if Version(version := importlib.metadata.version(name)) < Version(oldest)
    ]
    if old:
        return Finding("known vulnerabilities", "fail", ", ".join(old), "install the versions of requirements.lock")
    return Finding("known vulnerabilities", "pass", f"{', '.join(_OLDEST_SAFE)} have the known fixes")
