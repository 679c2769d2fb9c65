"""The catalog of benchmark splits: one YAML file per split, from the package and from the user."""

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import cast, get_args

from parcelray.config.benchmark import BenchmarkConfig, PromptFamily
from parcelray.config.loader import read_yaml, validate
from parcelray.errors import UserError

_SPLITS = Path(__file__).parent / "splits"


def load_benchmark(file: Path) -> BenchmarkConfig:
    """Reads the YAML file of one benchmark split.

    Raises:
        UserError: the file is not valid. The message names the file, the key, the value and the legal values.
    """
    return validate(BenchmarkConfig, read_yaml(file), str(file))


@cache
def builtin() -> dict[str, BenchmarkConfig]:
    """Returns the splits of the package by name."""
    return {config.name: config for config in map(load_benchmark, sorted(_SPLITS.glob("*.yaml")))}


def catalog(user_files: Iterable[Path] = ()) -> dict[str, BenchmarkConfig]:
    """Returns all splits by name. A file of the user overrides the package's split of the same name.

    Args:
        user_files: YAML files of the user, or folders of them.

    Raises:
        UserError: a file cannot be read, or is not valid.
    """
    benchmarks = dict(builtin())
    for path in user_files:
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} contains no YAML files; give files that describe one benchmark each.")
        benchmarks |= {config.name: config for config in map(load_benchmark, files)}
    return benchmarks


def find(name: str, benchmarks: dict[str, BenchmarkConfig]) -> BenchmarkConfig:
    """Returns the split of a name.

    Raises:
        UserError: the name is not in the catalog. The message suggests similar names.
    """
    if name not in benchmarks:
        close = difflib.get_close_matches(name, benchmarks, n=3)
        nearest = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UserError(
            f"There is no benchmark {name!r}{nearest}; `parcelray benchmarks list` lists all. Add your own as a YAML"
            " file."
        )
    return benchmarks[name]


def prompt_family(name: str) -> PromptFamily:
    """Returns the prompt family of a name on the command line.

    Raises:
        UserError: there is no such family.
    """
    for family in get_args(PromptFamily):
        if family == name:
            return cast(PromptFamily, family)
    raise UserError(f"--family is {name!r}; legal: {', '.join(get_args(PromptFamily))}.")
