"""docs/architecture.md names existing paths, all folders of the package, and the same levels as the import test."""

import re
from pathlib import Path

from tests.house.test_import_direction import LAYERS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform" / "parcelray"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def _paths() -> list[str]:
    """Returns what is in backticks outside code blocks and contains a slash or a file ending."""
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`([^`\s]+)`", prose)
    return [name for name in named if "/" in name[1:] or re.search(r"\.(?:py|ya?ml|md)$", name)]


def test_every_named_path_exists() -> None:
    paths = _paths()
    # A bare file name, such as `run.py`, stands for a file in several folders.
    missing = [
        path
        for path in paths
        if not ((ROOT / path).exists() or (PACKAGE / path).exists() or ("/" not in path and any(PACKAGE.rglob(path))))
    ]
    assert len(paths) > 20
    assert missing == [], "paths are relative to the root or to platform/parcelray"


def test_every_folder_of_the_package_is_named() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {name for name in folders if not re.search(rf"\b{name}\b", TEXT)} == set()


def test_the_diagram_has_the_levels_of_the_import_test() -> None:
    diagram = re.findall(r"^```\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)[0]
    parts = {part for level in LAYERS for part in level}
    rows = []
    for line in diagram.splitlines():
        # The names come first, before the description.
        names = []
        for word in line.split():
            if word not in parts:
                break
            names.append(word)
        rows.append(tuple(names))
    assert tuple(rows) == LAYERS[:-1], "pipelines, the last level, is outside the package"
