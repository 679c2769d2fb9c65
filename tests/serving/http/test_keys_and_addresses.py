"""Tests of API keys and of the addresses from which images may be fetched."""

import socket
from pathlib import Path
from typing import Any

import pytest

from parcelray.errors import UserError
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.auth import Gatekeeper, add_key, read_keys, remove_key
from parcelray.serving.http.remote_images import fetch_image, is_public


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::ffff:93.184.216.34", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::1", False),
        ("2002:a00:1::", False),
        ("2001:0:a00:1::1", False),
        ("::10.0.0.1", False),
        ("fec0::1", False),
    ],
)
def test_only_public_addresses_are_allowed(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example.com/a.png",
        "https://other.example.com/a.png",
        "https://images.example.com@127.0.0.1/a.png",
        "https://127.0.0.1\\@images.example.com/a.png",
        "https://images.example.com:8443/a.png",
        "https://images.example.com.evil.example/a.png",
        "https://IMAGES.example.com/a.png",
        "https://images.example.com/a b.png",
        "https://images.example.com/\r\nHost: x",
        "https://images.example.com#@evil.example/",
        "ftp://images.example.com/a.png",
    ],
)
def test_only_listed_hosts_are_contacted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a refused URL was resolved"))
    with pytest.raises(ApiError) as refused:
        fetch_image(url, {"images.example.com"}, 1000, "image 1")
    assert refused.value.status == 403
    assert "example" not in refused.value.message


def test_a_listed_host_inside_a_private_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Refused although one address is public, because the resolver decides which one is used.
    found = [(0, 0, 0, "", (address, 443)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("a private address was contacted"))
    with pytest.raises(ApiError) as refused:
        fetch_image("https://images.example.com/a.png", {"images.example.com"}, 1000, "image 1")
    assert refused.value.status == 403


def test_a_host_is_resolved_once_and_that_address_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[Any] = []
    dialled: list[Any] = []

    def resolve(*arguments: Any, **_: Any) -> list[Any]:
        looked_up.append(arguments)
        return [(0, 0, 0, "", ("93.184.216.34" if len(looked_up) == 1 else "10.0.0.1", 443))]

    def dial(address: Any, **_: Any) -> None:
        dialled.append(address)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", dial)
    with pytest.raises(ApiError) as refused:
        fetch_image("https://images.example.com/a.png", {"images.example.com"}, 1000, "image 1")
    assert refused.value.status == 422
    assert (len(looked_up), dialled) == (1, [("93.184.216.34", 443)])


def test_keys_are_stored_as_hashes_in_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "keys.txt"
    keys = [add_key(file, name, per_minute=60) for name in ("ann", "bob")]
    assert file.stat().st_mode & 0o077 == 0
    assert not any(key in file.read_text() for key in keys)
    keeper = Gatekeeper(read_keys(file))
    assert [keeper.admit(f"Bearer {key}") for key in keys] == ["ann", "bob"]
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {keys[0]}",
        f"Bearer {keys[0]}x",
        f"Bearer {read_keys(file)[0].hash}",
    ):
        with pytest.raises(ApiError) as refused:
            keeper.admit(wrong)
        assert refused.value.status == 401
    with pytest.raises(UserError, match="already"):
        add_key(file, "ann")
    file.write_text(file.read_text() + "plaintext-key\n")
    with pytest.raises(UserError, match="line 3"):
        read_keys(file)


def test_a_key_can_be_removed(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    keys = {name: add_key(file, name) for name in ("ann", "bob")}
    file.write_text("# of the team\n" + file.read_text())
    with pytest.raises(UserError, match="no key named eve; it has ann, bob"):
        remove_key(file, "eve")
    keeper = Gatekeeper(read_keys(file))
    remove_key(file, "ann")
    assert file.stat().st_mode & 0o077 == 0
    assert file.read_text().startswith("# of the team\n")
    keeper.replace(read_keys(file))
    assert keeper.admit(f"Bearer {keys['bob']}") == "bob"
    with pytest.raises(ApiError):
        keeper.admit(f"Bearer {keys['ann']}")
    with pytest.raises(UserError, match="only key"):
        remove_key(file, "bob")


def test_reloading_the_keys_does_not_reset_a_used_up_rate(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.txt", "ann", per_minute=1)
    keeper = Gatekeeper(read_keys(tmp_path / "keys.txt"), clock=lambda: 0.0)
    keeper.admit(f"Bearer {key}")
    add_key(tmp_path / "keys.txt", "bob")
    keeper.replace(read_keys(tmp_path / "keys.txt"))
    with pytest.raises(ApiError) as refused:
        keeper.admit(f"Bearer {key}")
    assert refused.value.status == 429


def test_a_key_has_a_rate_limit(tmp_path: Path) -> None:
    now = [0.0]
    key = add_key(tmp_path / "keys.txt", "ann", per_minute=6)
    keeper = Gatekeeper(read_keys(tmp_path / "keys.txt"), clock=lambda: now[0])
    for _ in range(6):
        keeper.admit(f"Bearer {key}")
    with pytest.raises(ApiError) as refused:
        keeper.admit(f"Bearer {key}")
    assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "10")
    now[0] = 10.0
    assert keeper.admit(f"Bearer {key}") == "ann"
