"""A local S3 server (moto) in a process of its own, for tests, and a proxy that makes it unavailable."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Literal

from parcelray.files import open_storage

from .processes import LIMIT_S, wait_until

BUCKET = "s3://bucket"
Fault = Literal["refuse", "reject", "ignore"]
"""What an unavailable store does with a connection: refuse it, answer with 503, or not answer."""


@contextmanager
def s3_server(address: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs an S3 server with one empty bucket, which a test can stop and continue; it keeps all objects in memory.

    Args:
        address: its URL, http://HOST:PORT; the same as AWS_ENDPOINT_URL.
    """
    host, port = address.removeprefix("http://").split(":")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", host, "-p", port],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _listens(host, int(port)), "the S3 server listens", server)
        filesystem, bucket = open_storage(BUCKET)
        filesystem.mkdir(bucket)
        yield server
    finally:
        server.kill()
        server.wait(LIMIT_S)


def _listens(host: str, port: int) -> bool:
    with closing(socket.socket()) as client:
        return client.connect_ex((host, port)) == 0


class FaultyProxy:
    """A loopback address of the S3 server that a test can make unavailable.

    Args:
        server: URL of the server.
    """

    def __init__(self, server: str) -> None:
        host, port = server.removeprefix("http://").split(":")
        self._server = (host, int(port))
        self._fault: Fault | None = None
        self._open: set[socket.socket] = set()
        self._listener = self._listen(0)
        self._port: int = self._listener.getsockname()[1]
        self.num_failed = 0
        """Number of connections that were rejected or left without an answer."""

    @property
    def url(self) -> str:
        """URL for AWS_ENDPOINT_URL."""
        return f"http://127.0.0.1:{self._port}"

    def fail(self, fault: Fault) -> None:
        """Fails all connections from now on, and ends those that are open."""
        self._fault = fault
        if fault == "refuse":
            _end(self._listener)
        self._end_connections()

    def work(self) -> None:
        """Forwards connections again."""
        fault, self._fault = self._fault, None
        if fault == "refuse":
            self._listener = self._listen(self._port)
        self._end_connections()

    def close(self) -> None:
        """Ends the proxy."""
        _end(self._listener)
        self._end_connections()

    def _end_connections(self) -> None:
        for connection in tuple(self._open):
            _end(connection)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), self._tracked(client):
            if self._fault is None:
                with self._tracked(socket.create_connection(self._server)) as server:
                    threading.Thread(target=_forward, args=(client, server), daemon=True).start()
                    _forward(server, client)
                return
            self.num_failed += 1
            if self._fault == "reject":
                client.recv(65536)
                client.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            else:
                while client.recv(65536):
                    pass

    @contextmanager
    def _tracked(self, connection: socket.socket) -> Iterator[socket.socket]:
        self._open.add(connection)
        try:
            with connection:
                yield connection
        finally:
            self._open.discard(connection)


def _forward(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(65536):
            target.sendall(content)
    _end(target)


def _end(connection: socket.socket) -> None:
    # Wakes a thread that waits for the socket, which `close` alone does not.
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
