"""What stands in the repository's files: plain ASCII code, no host of a package registry, no path of one machine, no command that is not there."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BINARY = {".safetensors", ".pkl", ".png", ".jpg", ".parquet", ".npz", ".pt2", ".woff2", ".ico", ".gif", ".pdf"}
# Written in pieces, so that this file passes its own test.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("download", "pytorch", "org"),
        ("anaconda", "org"),
    )
]
# Folders in which a developer's or a build machine's files lie; `/dev/shm`, `/usr/bin/env` and the like are the same on
# every machine.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~$}*>-])/(?:"
    + "|".join(("home", "root", "Users", "work", "tmp", "opt", "mnt", "private"))
    + r")/[\w.-]"
)


def _files() -> list[Path]:
    """The files that a commit of everything would hold."""
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(path for name in set(listing.stdout.split("\0")) if name and (path := ROOT / name).is_file())


FILES = _files()
TEXTS = [path for path in FILES if path.suffix not in BINARY]


def _places(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_code_is_ascii() -> None:
    assert (
        _places(re.compile(r"[^\x00-\x7f]"), [path for path in TEXTS if path.suffix in (".py", ".yaml", ".toml")]) == []
    )


def test_no_host_of_a_package_registry() -> None:
    assert _places(re.compile("|".join(map(re.escape, REGISTRY_HOSTS))), TEXTS) == []


def test_no_path_of_one_machine() -> None:
    assert _places(MACHINE_PATH, TEXTS) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("data: /" + "home/ann/nlvr", True),
        ("open('/" + "tmp/x')", True),
        ("cd /" + "work/main", True),
        ("GET /v1/models", False),
        ("runs/" + "tmp/x and ~/" + "work/x", False),
    ],
)
def test_the_guard_knows_a_machine_path(line: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) is found


def test_no_large_file() -> None:
    assert [
        f"{path.relative_to(ROOT)}: {path.stat().st_size >> 20} MB" for path in FILES if path.stat().st_size > 8 << 20
    ] == []


def test_the_package_does_not_print() -> None:
    assert (
        _places(
            re.compile(r"^\s*print\("),
            [path for path in TEXTS if path.suffix == ".py" and path.is_relative_to(ROOT / "platform")],
        )
        == []
    )


def test_commands_of_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    # Only code counts: `make sure` in a sentence is no command.
    code = re.findall(r"`[^`\n]+`", readme) + re.findall(r"^```.*?^```", readme, flags=re.MULTILINE | re.DOTALL)
    named = {name for text in code for name in re.findall(r"\bmake ([a-z][\w-]*)", text)}
    assert named <= targets, f"README.md names make {sorted(named - targets)}; the Makefile has {sorted(targets)}"


def test_job_files_of_the_readme_exist() -> None:
    named = set(
        re.findall(
            r"\b(?:jobs|pipelines|search_spaces)/[\w/.-]+\.(?:yaml|py|md)\b",
            (ROOT / "README.md").read_text(encoding="utf-8"),
        )
    )
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_lock_names_packages_and_versions_only() -> None:
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    assert [line for line in lines if line.startswith(("nvidia-", "cuda-", "triton"))] == []
