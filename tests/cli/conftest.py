"""The command line, run in the process of the test."""

import sys
from pathlib import Path
from typing import Any

import pytest

from parcelray import cli


class Outcome:
    """The output of a command and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], repo_root: Path) -> Any:
    """Runs `parcelray` with arguments in this process, in the repository's root."""

    def call(*arguments: str) -> Outcome:
        monkeypatch.chdir(repo_root)
        monkeypatch.setattr(sys, "argv", ["parcelray", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        else:
            code = 0
        found = capsys.readouterr()
        return Outcome(code, found.out, " ".join(found.err.split()))

    return call
