"""Functions that run next to each other, each in a Ray worker of its own.

The workers load this module, so it imports no heavy library.
"""

import os
from functools import partial
from pathlib import Path

import pytest

from parcelray.cluster.tasks import run_in_workers
from parcelray.errors import UserError

from ..processes import wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def _meet(own: Path, other: Path) -> int:
    own.touch()
    wait_until(other.exists, f"{other} exists")
    return os.getpid()


def _refuse(reason: str) -> int:
    raise UserError(reason)


def test_functions_run_at_the_same_time_in_processes_of_their_own(ray_session: None, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    found = dict(run_in_workers({"one": partial(_meet, one, two), "two": partial(_meet, two, one)}, at_once=2))
    assert found.keys() == {"one", "two"}
    assert len({os.getpid(), *found.values()}) == 3


def test_the_error_of_a_function_is_raised_and_the_others_are_stopped(ray_session: None, tmp_path: Path) -> None:
    waits = partial(_meet, tmp_path / "own", tmp_path / "never")
    with pytest.raises(UserError, match="the rows cannot be used"):
        list(run_in_workers({"waits": waits, "fails": partial(_refuse, "the rows cannot be used")}, at_once=2))
