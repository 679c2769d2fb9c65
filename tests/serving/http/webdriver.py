"""A minimal W3C WebDriver client for the playground's tests, with Debian's chromedriver and the standard library."""

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tests.serving.local import PATIENCE_S, wait_until

DRIVER = shutil.which("chromedriver")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
# Without its background services Chromium makes no network requests of its own.
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

    def wait(self, script: str, *arguments: Any) -> None:
        """Waits until a script returns a true value."""
        wait_until(lambda: self.run(script, *arguments), script)

    def messages(self) -> list[dict[str, Any]]:
        """Returns the console messages since the last call."""
        return list(self.command("POST", "/se/log", {"type": "browser"}))

    def command(self, method: str, path: str, body: Any = None) -> Any:
        return _send(method, self._base + path, body)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    assert DRIVER is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _is_ready(f"http://127.0.0.1:{port}/status"))
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {
            "capabilities": {
                "alwaysMatch": {
                    "browserName": "chrome",
                    "goog:chromeOptions": options,
                    "goog:loggingPrefs": {"browser": "ALL"},
                }
            }
        }
        session = _send("POST", f"http://127.0.0.1:{port}/session", wanted)["sessionId"]
        page = Browser(f"http://127.0.0.1:{port}/session/{session}")
        yield page
        page.command("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()


def _is_ready(url: str) -> bool:
    try:
        return bool(_send("GET", url)["ready"])
    except URLError:
        return False


def _send(method: str, url: str, body: Any = None) -> Any:
    request = Request(
        url, None if body is None else json.dumps(body).encode(), {"content-type": "application/json"}, method=method
    )
    try:
        with urlopen(request, timeout=PATIENCE_S) as response:
            return json.loads(response.read())["value"]
    except HTTPError as error:
        raise AssertionError(error.read().decode()) from None
