"""Reading of search spaces, and the check that the job of a space accepts every key and value that the space names."""

import copy
from pathlib import Path
from typing import Any

from parcelray.config.loader import JOB_MODELS, read_yaml, set_key, validate
from parcelray.config.search_space import SearchSpace
from parcelray.config.tune import TuneJob


def load_search_space(path: str | Path) -> SearchSpace:
    """Reads and validates one file of `search_spaces/`.

    Raises:
        ConfigError: the file cannot be used; names the file, the key path, the value and what is legal.
    """
    return validate(SearchSpace, read_yaml(path), str(path))


def check_search_space(space: SearchSpace, root: Path) -> None:
    """Checks a search space against the job file that it names.

    Args:
        space: the search space.
        root: folder that the path of the job file is relative to.

    Raises:
        ConfigError: the job has no such key or rejects an end of a domain; names the key, the value and what is legal.
    """
    _check(space, read_yaml(root / space.job))


def check_search_space_of(job: TuneJob) -> None:
    """Checks the search space of a search against the job that its trials run.

    Raises:
        ConfigError: the job has no such key or rejects an end of a domain; names the key, the value and what is legal.
    """
    _check(job.space, job.base.model_dump(mode="json", exclude_unset=True))


def _check(space: SearchSpace, job: dict[str, Any]) -> None:
    for name, domain in space.parameters.items():
        for value in domain.ends:
            data = copy.deepcopy(job)
            for key, needed in (space.needs(name) | {name: value}).items():
                set_key(data, key, needed, f"search space {space.name}")
            validate(JOB_MODELS[str(job["kind"])], data, f"search space {space.name}")
