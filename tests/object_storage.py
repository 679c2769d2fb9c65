"""A local S3 server (moto) in a process of its own, for tests."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

from parcelray.files import open_storage

from .processes import LIMIT_S, wait_until

BUCKET = "s3://bucket"


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
