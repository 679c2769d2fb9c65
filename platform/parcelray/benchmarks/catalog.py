"""Every benchmark split by name: one YAML file each, those of the package and those of the user."""

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from parcelray.config.benchmark import BenchmarkConfig
from parcelray.config.loader import read_yaml, validate
from parcelray.errors import UserError

_SPLITS = Path(__file__).parent / "splits"


def load_benchmark(file: Path) -> BenchmarkConfig:
    """Reads one file.

    Raises:
        UserError: naming the file, the key, the value and what is legal.
    """
    return validate(BenchmarkConfig, read_yaml(file), str(file))


@cache
def builtin() -> dict[str, BenchmarkConfig]:
    """The package's own splits by name."""
    return {config.name: config for config in map(load_benchmark, sorted(_SPLITS.glob("*.yaml")))}


def catalog(own: Iterable[Path] = ()) -> dict[str, BenchmarkConfig]:
    """All splits by name; a file of the user's goes before the package's split of the same name.

    Args:
        own: YAML files, or folders of them.

    Raises:
        UserError: a file cannot be read, or is not legal.
    """
    found = dict(builtin())
    for path in own:
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} holds no YAML files; give files that describe a benchmark each.")
        found |= {config.name: config for config in map(load_benchmark, files)}
    return found


def find(name: str, benchmarks: dict[str, BenchmarkConfig]) -> BenchmarkConfig:
    """A split by name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in benchmarks:
        close = difflib.get_close_matches(name, benchmarks, n=3)
        nearest = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UserError(
            f"There is no benchmark {name!r}{nearest}; `parcelray benchmarks list` shows all, and a YAML file of your"
            " own adds one."
        )
    return benchmarks[name]
