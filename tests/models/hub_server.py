"""A server on the loopback address with the layout of the Hugging Face hub."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

LARGE = 10_000
"""Files from this size on are stored like the hub's large files: under their sha256, behind a redirect."""


class HubServer(ThreadingHTTPServer):
    """The hub.

    Args:
        repositories: folder of each repository, such as `org/name`; its commit is a hash of its files.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.limited = False
        """Whether every request is refused, because there were too many."""

    @property
    def url(self) -> str:
        """Address for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str) -> str:
        """Returns the commit that `main` is at."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path, content in self.files(name).items():
            digest.update(path.encode() + content)
        return digest.hexdigest()

    def files(self, name: str) -> dict[str, bytes]:
        """Returns the files of a repository by path."""
        root = self.repositories[name]
        return {
            path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
        }


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    # The hub's own names of errors, by status.
    codes: ClassVar[dict[str, int]] = {
        "RepoNotFound": 404,
        "RevisionNotFound": 404,
        "EntryNotFound": 404,
        "GatedRepo": 403,
    }

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def _answer(self, *, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.requests.append(f"{self.command} {'/'.join(parts)}")
        if self.server.limited:
            self._send(429, {}, b"{}", with_body)
        elif parts[:2] == ["api", "models"] and len(parts) == 6:
            self._api("/".join(parts[2:4]), parts[4], parts[5], with_body)
        elif parts[0] == "cdn":
            found = [each for name in self.server.repositories for each in self.server.files(name).values()]
            self._send(200, {}, next(each for each in found if _sha256(each) == parts[1]), with_body)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)
        else:
            self._error("EntryNotFound", with_body)

    def _api(self, name: str, what: str, revision: str, with_body: bool) -> None:
        problem = self._problem(name, revision)
        if problem is not None:
            self._error(problem, with_body)
            return
        commit, files = self.server.commit(name), self.server.files(name)
        content: object
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            content = {"_id": "0", "id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        else:
            content = [_entry(path, each) for path, each in files.items()]
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode(), with_body)

    def _file(self, name: str, revision: str, path: str, with_body: bool) -> None:
        problem = self._problem(name, revision)
        if problem is None and path not in self.server.files(name):
            problem = "EntryNotFound"
        if problem is not None:
            self._error(problem, with_body)
            return
        content = self.server.files(name)[path]
        headers = {"X-Repo-Commit": self.server.commit(name)}
        if len(content) < LARGE:
            self._send(200, headers | {"ETag": f'"{_oid(content)}"'}, content, with_body)
            return
        # Like on the hub, another host: its client reads the headers of this answer, and follows only to download.
        cdn = f"http://localhost:{self.server.server_port}/cdn"
        headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        self._send(302, headers | {"Location": f"{cdn}/{_sha256(content)}"}, b"", with_body)

    def _problem(self, name: str, revision: str) -> str | None:
        if name not in self.server.repositories:
            return "RepoNotFound"
        if name in self.server.gated:
            return "GatedRepo"
        return None if revision in ("main", self.server.commit(name)) else "RevisionNotFound"

    def _error(self, code: str, with_body: bool) -> None:
        self._send(self.codes[code], {"X-Error-Code": code, "X-Error-Message": code}, b"{}", with_body)

    def _send(self, status: int, headers: dict[str, str], body: bytes, with_body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "oid": _oid(content), "size": len(content), "path": path}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
