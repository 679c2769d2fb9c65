"""A search that was interrupted before the package was restructured is resumed from its record of finished trials.

How its run folder was made is described in tests/fixtures/old_layout/search/README.md.
"""

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parcelray.config.tune import TuneJob
from parcelray.errors import UserError
from parcelray.tracking.run_folder import RunFolder
from parcelray.tuning.results import select
from parcelray.tuning.run import run_tuning
from parcelray.tuning.trial_record import TrialRecord

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "old_layout" / "search" / "old_search"


@pytest.fixture
def job(tmp_path: Path) -> TuneJob:
    """The job of the search, whose run folder is a copy of the old one."""
    shutil.copytree(FOLDER, tmp_path / "tune" / "old_search")
    return _job(tmp_path)


def _job(storage: Path, **changes: Any) -> TuneJob:
    data = {
        "kind": "tune",
        "name": "old_search",
        "space": {
            "kind": "search_space",
            "name": "budgets",
            "job": "base.yaml",
            "parameters": {"budgets": {"type": "choice", "values": [[16], [32], [64], [128]]}},
        },
        "base": {
            "kind": "evaluate",
            "name": "base",
            "model": {"type": "checkpoint", "reference": "mini_llava"},
            "reducer": {"type": "cluster_aggregate"},
            "benchmarks": [{"name": "mini", "source": {"samples": 4, "families": ["general"]}, "max_new_tokens": 2}],
            "compute": {"actors": 0, "threads_per_actor": 1},
            "storage": str(storage),
        },
        "algorithm": {"type": "grid"},
        "objectives": [{"metric": "score", "mode": "max"}, {"metric": "tokens", "mode": "min"}],
        "tracking": {"uri": None},
        "storage": str(storage),
    }
    return TuneJob.model_validate(data | changes)


def test_the_snapshot_of_ray_tune_cannot_be_loaded_any_more() -> None:
    # It names classes by module path. Hence the search must be resumed without it.
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        pickle.loads((FOLDER / "tune" / "tuner.pkl").read_bytes())


def test_the_old_folder_belongs_to_the_same_search_and_its_trials_can_be_selected(job: TuneJob, tmp_path: Path) -> None:
    run_folder = RunFolder(job)
    assert run_folder.identity == json.loads((FOLDER / "job.json").read_text())["identity"]
    run_folder.check()
    trials = TrialRecord(run_folder.local_path("")).trials
    chosen = select(job, trials, "max score subject to tokens <= 64", tmp_path / "selected.yaml")
    assert chosen.trial.assignment == {"budgets": [32]}


def test_a_changed_search_under_the_same_name_is_refused_with_the_changed_keys_only(
    job: TuneJob, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"configuration differs from this one \(seed: 0 -> 1\)"):
        RunFolder(_job(tmp_path, seed=1)).check()


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_search_is_resumed_and_runs_only_the_missing_trials(ray_session: None, job: TuneJob) -> None:
    with pytest.raises(UserError, match=r"has 2 finished trials of this search; add --resume to continue it"):
        run_tuning(job, Console(quiet=True))
    output = io.StringIO()
    run = run_tuning(job, Console(file=output, width=300), resume=True)
    record = TrialRecord(FOLDER)
    assert run.findings.trials[:2] == record.trials, "finished trials are not run again"
    assert [trial.assignment["budgets"] for trial in run.findings.trials] == [[16], [32], [64], [128]]
    assert run.findings.failed == []
    assert f"Resuming from {run.folder / 'trials.jsonl'}; Ray Tune's own state of earlier sessions is ignored" in (
        output.getvalue()
    )
    assert "4 trials, 2 of them finished" in output.getvalue()
