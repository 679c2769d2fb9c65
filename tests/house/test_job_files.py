"""Every file in jobs/ and search_spaces/ is read by the loader that the commands use."""

from pathlib import Path

import pytest

from parcelray.config.loader import check_search_space, command_of, identity, load_job, load_search_space

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "jobs").rglob("*.yaml"))
SEARCH_SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", JOBS, ids=_name)
def test_job_file_is_a_legal_run(path: Path) -> None:
    job = load_job(path)
    assert job.kind == path.relative_to(ROOT / "jobs").parts[0], "jobs/<kind>/ holds the jobs of that kind"


@pytest.mark.parametrize("path", JOBS, ids=_name)
def test_job_file_opens_with_its_command(path: Path) -> None:
    opening = [line for line in path.read_text(encoding="utf-8").splitlines()[:10] if line.startswith("#")]
    assert any(f"parcelray {command_of(path.parent.name)} {_name(path)}" in line for line in opening), "a job file's first lines say how to run it"


def test_two_job_files_are_two_runs() -> None:
    identities = [identity(load_job(path)) for path in JOBS]
    assert len(identities) == len(set(identities))


@pytest.mark.parametrize("path", SEARCH_SPACES, ids=_name)
def test_search_space_fits_its_job(path: Path) -> None:
    space = load_search_space(path)
    assert space.name == path.stem
    check_search_space(space, ROOT)
