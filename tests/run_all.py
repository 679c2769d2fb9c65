"""Runs the tests in three groups and prints one summary: failures, slowest tests, skipped tests and the reasons.

`make test` and `make test-all` call this. If a group fails, the next one still runs. Tests with Ray have separate
groups, because a process that is connected to Ray differs from one that is not. Ray Serve alone uses both cores.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

# Two processes share the files, so that module fixtures are created once. The order is that of conftest.py.
_TWO_PROCESSES = ("-n", "2", "--dist", "loadscope", "--no-loadscope-reorder")
_GROUPS = {"not ray": _TWO_PROCESSES, "ray and not serving": _TWO_PROCESSES, "ray and serving": ()}
"""Marker expression -> options of pytest."""
_NO_TESTS = 5
_SLOWEST = 20


class _Case(NamedTuple):
    name: str
    seconds: float
    outcome: str
    """passed, failed or skipped."""
    reason: str
    """Reason why it was skipped."""


def main() -> int:
    """Runs all groups; returns 0 if none failed, otherwise 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nightly", action="store_true", help="also run the tests with the marker `nightly`")
    excluded = "not gpu" if parser.parse_args().nightly else "not gpu and not nightly"
    cases: list[_Case] = []
    lines: list[str] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="parcelray-tests-") as folder:
        for number, (group, options) in enumerate(_GROUPS.items()):
            report = Path(folder) / f"{number}.xml"
            started = time.monotonic()
            markers = f"{excluded} and {group}"
            command = [sys.executable, "-m", "pytest", *options, "-m", markers, f"--junit-xml={report}", *_files(group)]
            code = subprocess.run([*command, "-o", "junit_family=xunit1"], check=False).returncode
            found = _cases(report) if report.is_file() else []
            outcome = "passed" if code in (0, _NO_TESTS) else f"FAILED (pytest exit code {code})"
            lines.append(f"{group}: {len(found)} tests in {time.monotonic() - started:.0f} s, {outcome}")
            failed |= code not in (0, _NO_TESTS)
            cases += found
    sys.stdout.write("\n".join(["", *_summary(cases), "", *lines, "FAILED" if failed else "All groups passed."]) + "\n")
    return int(failed)


def _files(group: str) -> list[str]:
    """Finds the test files that use the markers of a group; pytest would spend seconds on the import of the others."""
    markers = [f"mark.{word}" for word in group.split(" and ") if not word.startswith("not ")]
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("test_*.py"))}
    return [str(path) for path, text in texts.items() if all(marker in text for marker in markers)]


def _cases(report: Path) -> list[_Case]:
    cases = []
    for case in ET.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        wrong = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if wrong else "skipped" if skipped is not None else "passed"
        file = case.get("file") or str(case.get("classname")).replace(".", "/") + ".py"
        reason = "" if skipped is None else str(skipped.get("message"))
        cases.append(_Case(f"{file}::{case.get('name')}", float(case.get("time", 0)), outcome, reason))
    return cases


def _summary(cases: list[_Case]) -> list[str]:
    slowest = sorted(cases, key=lambda case: -case.seconds)[:_SLOWEST]
    lines = [f"{_SLOWEST} slowest tests:", *(f"  {case.seconds:6.1f} s  {case.name}" for case in slowest)]
    wrong = [case.name for case in cases if case.outcome == "failed"]
    lines += ["", f"{len(wrong)} failed tests:" if wrong else "No test failed.", *(f"  {name}" for name in wrong)]
    skipped = defaultdict(list)
    for case in cases:
        if case.outcome == "skipped":
            skipped[case.reason].append(case.name)
    if not skipped:
        return [*lines, "No test was skipped."]
    lines.append("Skipped tests, by reason:")
    for reason, names in skipped.items():
        files = sorted({name.split("::")[0] for name in names})
        lines.append(f"  {len(names)} in {', '.join(files)}: {reason}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
