"""Checks before a submission: dashboard address, token, version of Ray and resources."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from parcelray.cluster.auth import auth_headers, find_token
from parcelray.cluster.preflight import check_version, cluster_version, dashboard_url
from parcelray.errors import UserError


@pytest.fixture(autouse=True)
def no_cluster_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


class RedirectHandler(BaseHTTPRequestHandler):
    """Redirects every request to a login page, as some proxies do."""

    tokens: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.tokens.append(self.headers.get("Authorization"))
        self.send_response(302)
        self.send_header("Location", "/login")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def redirecting() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), RedirectHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    RedirectHandler.tokens.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_given_address_takes_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://ray:1")
    assert dashboard_url(None) == "http://ray:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://api:2")
    assert dashboard_url(None) == "http://api:2"
    assert dashboard_url("https://given:3/") == "https://given:3"
    assert dashboard_url("given:8265") == "http://given:8265"


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "auto", "local", "http://", "http://user:pass@head:8265", "http://head:8265/api"]
)
def test_an_address_that_is_not_a_dashboard_is_rejected(address: str) -> None:
    with pytest.raises(UserError, match="is not the address of a Ray dashboard"):
        dashboard_url(address)


def test_a_missing_address_is_rejected() -> None:
    with pytest.raises(UserError, match="No cluster address is set"):
        dashboard_url(None)


def test_an_unreachable_dashboard_is_reported() -> None:
    with pytest.raises(UserError, match=r"Nothing responds at http://127\.0\.0\.1:9 "):
        cluster_version("http://127.0.0.1:9", None)


def test_a_redirect_is_rejected_and_the_token_is_not_sent_to_its_target(redirecting: str) -> None:
    with pytest.raises(UserError, match="responds with status 302"):
        cluster_version(redirecting, "t0ken")
    assert RedirectHandler.tokens == ["Bearer t0ken"]


def test_a_version_mismatch_names_both_versions() -> None:
    check_version("2.60.0", "2.60.0")
    with pytest.raises(UserError, match=r"cluster runs Ray 2\.54\.0 and this machine Ray 2\.60\.0"):
        check_version("2.54.0", "2.60.0")


def test_the_token_is_looked_up_in_rays_order(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert find_token(home) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home\n")
    assert find_token(home) == "from-home"
    (tmp_path / "named").write_text("from-path\n")
    named = home | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}
    assert find_token(named) == "from-path"
    assert find_token(named | {"RAY_AUTH_TOKEN": "from-variable"}) == "from-variable"
    assert find_token(named | {"RAY_AUTH_MODE": "disabled"}) is None
    assert auth_headers(None) == {}


def test_a_missing_or_empty_token_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "absent")})
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="is an empty file"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "empty")})
