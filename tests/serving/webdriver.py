"""As much of the W3C WebDriver protocol as the page's test needs, over Debian's chromedriver: no package beside the standard library."""

import base64
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

DRIVER = shutil.which("chromedriver")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
# Without its background services Chromium asks nobody for anything.
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1180,1000",
    "--force-color-profile=srgb",
)


class Browser:
    """One page in headless Chromium."""

    def __init__(self, base: str) -> None:
        self._base = base

    def open(self, url: str) -> None:
        self.command("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.command("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def element(self, selector: str) -> str:
        return str(self.command("POST", "/element", {"using": "css selector", "value": selector})[_ELEMENT])

    def click(self, selector: str) -> None:
        self.command("POST", f"/element/{self.element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self.command("POST", f"/element/{self.element(selector)}/value", {"text": text})

    def wait(self, script: str, *arguments: Any, seconds: float = 20) -> Any:
        """Until a script gives something true."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < deadline, script
            time.sleep(0.05)
        return found

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.command("GET", "/screenshot")))

    def command(self, method: str, path: str, body: Any = None) -> Any:
        return _ask(method, self._base + path, body)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    assert DRIVER is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}/status")
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}}
        session = _ask("POST", f"http://127.0.0.1:{port}/session", wanted)["sessionId"]
        page = Browser(f"http://127.0.0.1:{port}/session/{session}")
        yield page
        page.command("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            _ask("GET", url)
            return
        except URLError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def _ask(method: str, url: str, body: Any = None) -> Any:
    request = Request(url, None if body is None else json.dumps(body).encode(), {"content-type": "application/json"}, method=method)
    try:
        with urlopen(request, timeout=120) as response:
            return json.loads(response.read())["value"]
    except HTTPError as error:
        raise AssertionError(error.read().decode()) from None
