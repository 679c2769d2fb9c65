"""Fixture of a cluster on hosts of its own; see tests/hosts.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..hosts import Hosts, start_hosts, why_no_hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Starts a head, two workers, an S3 server and an MLflow server on hosts without a shared disk."""
    if reason := why_no_hosts():
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("hosts")
    with start_hosts(folder) as started:
        yield started
