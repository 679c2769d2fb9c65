"""Every file in jobs/ and search_spaces/ is legal, and every job file begins with its command."""

from pathlib import Path

from parcelray.config.identity import identity
from parcelray.config.loader import command_of, load_job
from parcelray.config.space_checks import check_search_space, load_search_space

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "jobs").rglob("*.yaml"))
SEARCH_SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_job_files_are_legal_runs() -> None:
    # The error of the loader names the file and the key.
    misplaced = [_name(path) for path in JOBS if load_job(path).kind != path.relative_to(ROOT / "jobs").parts[0]]
    assert JOBS
    assert misplaced == [], "jobs/<kind>/ must hold only jobs of that kind"


def test_job_files_open_with_their_command() -> None:
    without = [path for path in JOBS if not any(_command(path) in line for line in _opening(path))]
    assert [_name(path) for path in without] == [], "the first lines of a job file must contain its command"


def _command(path: Path) -> str:
    return f"parcelray {command_of(path.parent.name)} {_name(path)}"


def _opening(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines()[:10] if line.startswith("#")]


def test_job_files_have_different_identities() -> None:
    identities = [identity(load_job(path)) for path in JOBS]
    assert len(identities) == len(set(identities))


def test_search_spaces_fit_their_jobs() -> None:
    spaces = {path.stem: load_search_space(path) for path in SEARCH_SPACES}
    assert spaces
    assert [(stem, space.name) for stem, space in spaces.items() if space.name != stem] == []
    for space in spaces.values():
        check_search_space(space, ROOT)
