"""Images by https, from a TLS server on the loopback that plays an allowed host."""

import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from parcelray.serving.http import remote_images
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.remote_images import fetch_image
from tests.serving.local import PATIENCE_S

pytestmark = pytest.mark.serving
HOST = "images.example.com"
Talk = Callable[[ssl.SSLSocket], None]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for one name, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "host.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(built.public_bytes(serialization.Encoding.PEM) + secret)
    return file


class Server:
    """A TLS server that runs the `talk` function of a test on each connection."""

    def __init__(self, certificate: Path) -> None:
        self.talk: Talk = lambda connection: None
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                plain, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        try:
            with self._context.wrap_socket(plain, server_side=True) as connection:
                connection.recv(10_000)
                self.talk(connection)
        except OSError:
            plain.close()


@pytest.fixture
def server(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(remote_images, "_PORT", server.port)
    monkeypatch.setattr(remote_images, "TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(remote_images, "is_public", lambda address: not ipaddress.ip_address(address).is_multicast)
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", server.port))],
    )
    yield server
    server.close()


def answering(head: str, body: bytes = b"") -> Talk:
    return lambda connection: connection.sendall(f"HTTP/1.1 {head}\r\nconnection: close\r\n\r\n".encode() + body)


def refused(max_bytes: int = 1000, host: str = HOST) -> ApiError:
    with pytest.raises(ApiError) as found:
        fetch_image(f"https://{host}/a.png", {HOST, "other.example.com"}, max_bytes, "url")
    return found.value


def test_an_image_is_downloaded(server: Server) -> None:
    server.talk = answering("200 OK\r\ncontent-length: 5", b"image")
    assert fetch_image(f"https://{HOST}/a.png?b=1", {HOST}, 5, "url") == b"image"


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.talk = answering("302 Found\r\nlocation: https://10.0.0.1/")
    assert (refused().status, refused().message) == (
        422,
        "The host of url answered with status 302; legal is 200, redirects are not followed.",
    )


def test_reading_stops_after_too_many_bytes(server: Server) -> None:
    def talk(connection: Any) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(bytes(100_000))

    server.talk = talk
    assert refused(max_bytes=200_000).status == 413


def test_fewer_bytes_than_declared_are_refused(server: Server) -> None:
    server.talk = answering("200 OK\r\ncontent-length: 50", b"image")
    assert refused().status == 422


def test_a_certificate_of_another_name_is_refused(server: Server) -> None:
    server.talk = answering("200 OK\r\ncontent-length: 5", b"image")
    assert refused(host="other.example.com").status == 422


def trickle_body(connection: Any) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
    trickle(connection)


def trickle_to_the_end(connection: Any) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
    trickle(connection)


def trickle_handshake(plain: socket.socket) -> None:
    # The header of a handshake record of 16 KiB, whose content then arrives slowly.
    plain.sendall(b"\x16\x03\x03\x40\x00")
    with plain:
        trickle(plain)


def trickle(connection: Any) -> None:
    """Sends a byte every 50 ms until the client disconnects, so a socket timeout never expires."""
    with suppress(OSError):
        while True:
            connection.sendall(b"a")
            time.sleep(0.05)


@pytest.mark.parametrize("talk", [trickle, trickle_body, trickle_to_the_end])
def test_a_slow_host_is_disconnected_at_the_deadline(
    server: Server, monkeypatch: pytest.MonkeyPatch, talk: Talk
) -> None:
    monkeypatch.setattr(remote_images, "TIMEOUT_S", 0.5)
    server.talk = talk
    # The host itself would send forever.
    assert refused(max_bytes=10**9).status == 422


def test_a_host_without_a_handshake_is_disconnected_at_the_deadline(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_images, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(server, "_serve", trickle_handshake)
    assert refused().status == 422
