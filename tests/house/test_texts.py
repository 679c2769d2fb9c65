"""Rules for the text of all files: ASCII code, line lengths, no registry hosts or machine paths, existing commands."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from parcelray import cli

ROOT = Path(__file__).resolve().parents[2]
BINARY = {".safetensors", ".pkl", ".png", ".jpg", ".parquet", ".npz", ".pt2", ".woff2", ".ico", ".gif", ".pdf", ".xz"}
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
# Folders with the files of one developer or build machine. `/dev/shm`, `/usr/bin/env` and the like are the same on
# every machine and are allowed.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~$}*>-])/(?:"
    + "|".join(("home", "root", "Users", "work", "tmp", "opt", "mnt", "private"))
    + r")/[\w.-]"
)


def _files() -> list[Path]:
    """Returns the files that `git add --all` and a commit would contain."""
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
# Entries of jobs/LOG.md from before the rule are kept as they are.
_OLD_ENTRY = re.compile(r"## (?:2026-11-2[0-8]|Not measured)")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _lines_matching(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_code_is_ascii() -> None:
    assert (
        _lines_matching(
            re.compile(r"[^\x00-\x7f]"), [path for path in TEXTS if path.suffix in (".py", ".yaml", ".toml")]
        )
        == []
    )


def test_no_host_of_a_package_registry() -> None:
    assert _lines_matching(re.compile("|".join(map(re.escape, REGISTRY_HOSTS))), TEXTS) == []


def test_no_path_of_one_machine() -> None:
    assert _lines_matching(MACHINE_PATH, TEXTS) == []


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
def test_the_pattern_finds_machine_paths(line: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) is found


def test_no_large_file() -> None:
    assert [
        f"{path.relative_to(ROOT)}: {path.stat().st_size >> 20} MB" for path in FILES if path.stat().st_size > 8 << 20
    ] == []


def test_the_package_does_not_print() -> None:
    assert (
        _lines_matching(
            re.compile(r"^\s*print\("),
            [path for path in TEXTS if path.suffix == ".py" and path.is_relative_to(ROOT / "platform")],
        )
        == []
    )


def test_make_targets_in_readme_and_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    unknown = [
        f"{path.name}: make {name}"
        for path in DOCS
        # Only code counts: `make sure` in a sentence is not a command.
        for code in _code(path)
        for name in re.findall(r"\bmake ([a-z][\w-]*)", code)
        if name not in targets
    ]
    assert unknown == [], f"the Makefile has {sorted(targets)}"


def test_commands_in_readme_and_docs_exist() -> None:
    """Every `parcelray COMMAND [SUBCOMMAND]` in code is a command of the CLI."""
    root = typer.main.get_command(cli.app)
    unknown = []
    for path in DOCS:
        for code in _code(path):
            for words in re.findall(r"\bparcelray ([a-z]+)(?: ([a-z]+)(?![\w/.:]))?", code):
                group = getattr(root, "commands", {}).get(words[0])
                below = getattr(group, "commands", {})
                if group is None or (words[1] and below and words[1] not in below):
                    unknown.append(f"{path.name}: parcelray {' '.join(words)}")
    assert unknown == []


def test_files_in_readme_and_docs_exist() -> None:
    named = re.compile(r"\b(?:jobs|pipelines|search_spaces|deploy)/[\w/.-]+\.(?:yaml|yml|json|py|md)\b")
    linked = re.compile(r"\]\(([^)#:\s]+)[^)\s]*\)")
    missing = []
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        missing += [f"{path.name}: {name}" for name in named.findall(text) if not (ROOT / name).is_file()]
        missing += [f"{path.name}: {name}" for name in linked.findall(text) if not (path.parent / name).exists()]
    assert missing == []


def test_markdown_lines_have_at_most_120_columns() -> None:
    # Model cards are covered by the manifest of their checkpoint and must not change.
    pages = [path for path in TEXTS if path.suffix == ".md" and "assets" not in path.parts]
    long = [
        f"{path.relative_to(ROOT)}:{number}: {len(line)} columns"
        for path in pages
        for number, line in _prose(path)
        if len(line) > 120 and not re.fullmatch(r"[\s>*-]*\S+", line)
    ]
    assert long == [], "tables, code blocks and single links may be longer; prose may not"


def test_comments_of_other_files_have_at_most_120_columns() -> None:
    """Checks the comments of YAML and TOML files and the Makefile; ruff checks the Python files."""
    files = [
        path
        for path in TEXTS
        if (path.suffix in (".yaml", ".yml", ".toml") or path.name == "Makefile")
        # Descriptions of benchmarks are data: prompts and sources are kept in one line.
        and not path.is_relative_to(ROOT / "platform")
    ]
    assert _lines_matching(re.compile(r"^(?=\s*(?:#|@?echo )).{121,}"), files) == []


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the numbered lines of a Markdown file outside tables, code blocks and old entries of the log."""
    in_code = in_old_entry = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("## "):
            in_old_entry = path.name == "LOG.md" and bool(_OLD_ENTRY.match(line))
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not in_old_entry and not line.startswith("|"):
            yield number, line


def _code(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(r"`[^`\n]+`", text) + re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL)


def test_lock_names_packages_and_versions_only() -> None:
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    assert [line for line in lines if line.startswith(("nvidia-", "cuda-", "triton"))] == []
