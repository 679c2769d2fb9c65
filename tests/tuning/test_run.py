"""Whole searches on Ray Tune, from the job to results, pictures and MLflow, and their refusals."""

import io
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from parcelray.config.connector import ParcelConnectorConfig
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job
from parcelray.config.tune import TuneJob
from parcelray.errors import UserError
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.manifest import MANIFEST_NAME, verify_manifest, write_manifest
from parcelray.models.vlm import config_of
from parcelray.tracking.run_folder import RunFolder
from parcelray.training.start import build_start
from parcelray.tuning.confirm import confirm_splits
from parcelray.tuning.plan import tuning_plan
from parcelray.tuning.results import select
from parcelray.tuning.run import SearchRun, run_tuning, searched_models

from ..training.conftest import TINY, tiny_job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supernet")
    # The mini base with an untrained connector: its anchors are pooled patches, which the model understands, but its
    # queries are noise.
    connector = {"type": "parcel", "num_heads": 3, "anchor_grids": [0, 1, 2, 4, 8, 16]}
    job = tiny_job(folder, model={"type": "checkpoint", "reference": "mini_base"}, connector=connector)
    model, processor = build_start(job, resolve_checkpoint("mini_base").path)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_manifest(folder / "model", config={}, git_commit=None, data=None, seed=3)
    return folder / "model"


def _split_job(storage: Path, supernet: Path, **changes: Any) -> TuneJob:
    data = {
        "kind": "tune",
        "name": "splits",
        "space": {
            "kind": "search_space",
            "name": "splits",
            "job": "none",
            "parameters": {
                "anchor_grid": {"type": "choice", "values": [0, 2, 4, 8]},
                "budgets": {"type": "choice", "values": [[8], [16], [64]]},
            },
            "constraints": [
                {"type": "anchors_fit", "anchor_grid": "anchor_grid", "budget": "budgets", "patch_grid": 16}
            ],
        },
        "base": {
            "kind": "evaluate",
            "name": "base",
            "model": {"reference": str(supernet)},
            "benchmarks": [
                {"name": "mini", "source": {"samples": 12, "families": ["general", "video"]}, "max_new_tokens": 8}
            ],
            # The reference is evaluated in this process, and one actor runs all trials, because starting more actors
            # would take longer than all trials.
            "compute": {"actors": 0, "rows_per_shard": 8, "threads_per_actor": 1},
            "storage": str(storage),
        },
        "algorithm": {"type": "grid"},
        "objectives": [{"metric": "score", "mode": "max"}, {"metric": "tokens", "mode": "min"}],
        "adaptive": {"budgets": [16, 64]},
        "tracking": {"uri": f"sqlite:///{storage}/mlflow.db"},
        "storage": str(storage),
    }
    return TuneJob.model_validate(data | changes)


def _run(job: TuneJob, **options: Any) -> tuple[SearchRun, str]:
    text = io.StringIO()
    return run_tuning(job, Console(file=text, width=200), **options), text.getvalue()


@pytest.fixture(scope="module")
def searched(
    ray_session: None, supernet: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TuneJob, SearchRun, str]:
    job = _split_job(tmp_path_factory.mktemp("search"), supernet)
    return job, *_run(job)


def test_a_split_search_writes_results_pictures_and_a_model(searched: tuple[TuneJob, SearchRun, str]) -> None:
    job, run, text = searched
    findings = run.findings
    assert (len(findings.trials), len(findings.failed)) == (job.space.size, 0) == (9, 0)
    assert findings.front
    assert findings.knee in findings.front
    # The model understands only pooled patches, so the split without anchors is not the best one.
    assert [each.anchor_grid for each in findings.splits][-1] == 8
    assert {each.num_visual_tokens: each.rule for each in findings.splits} == {8: None, 16: 4, 64: 8}
    assert set(findings.importance) == {"anchor_grid", "budgets"}
    assert [each.family for each in findings.families] == ["general", "video"]
    for each in findings.families:
        values = [trial.metrics[f"retention/{each.family}"] for trial in findings.trials]
        assert values[each.best] == max(values)
        assert findings.trials[each.trial].metrics["tokens"] <= findings.trials[each.best].metrics["tokens"]
        assert each.retention.low <= values[each.trial] <= each.retention.high
    assert "within one standard error of the best, by family" in text
    names = [
        "results.json",
        "frontier.png",
        "families.png",
        "splits.png",
        "parallel.png",
        "importance.png",
        "volume.png",
        "routing.yaml",
    ]
    assert all((run.folder / name).stat().st_size > 100 for name in names[:-1])
    assert json.loads((run.folder / "results.json").read_text())["routing"][-1]["max_budget"] == 256
    verify_manifest(run.folder / "model")
    connector = config_of(run.folder / "model").connector_config
    assert isinstance(connector, ParcelConnectorConfig)
    assert connector.routing is not None
    assert [route.anchor_grid for route in connector.routing][-1] == findings.splits[-1].anchor_grid
    assert "9 of 9 trials done" in text
    # The curves are drawn on the frontier of the search. The predictor never spends more than the larger budget.
    assert findings.adaptive is not None
    curves = json.loads((run.folder / "results.json").read_text())["adaptive"]
    assert list(curves) == ["mixture of the chosen splits", "budget by predictor", "escalate 16 > 64"]
    chosen = {each.num_visual_tokens: each.anchor_grid for each in findings.splits}
    ends = {
        trial.metrics["tokens"]: trial.metrics["score"]
        for trial in findings.trials
        if chosen.get(trial.assignment["budgets"][0]) == trial.assignment["anchor_grid"]
    }
    assert curves["mixture of the chosen splits"][0] == pytest.approx([16, ends[16]])
    assert all(16 <= tokens <= 64 for tokens, _ in curves["budget by predictor"])
    assert (run.folder / "adaptive" / "adaptive.png").is_file()
    assert "gain at equal tokens" in text
    assert "--set 'connector.routing=[{min_budget: 8," in text


def test_mlflow_has_one_finished_run_per_trial(searched: tuple[TuneJob, SearchRun, str]) -> None:
    job, run, _ = searched
    assert run.mlflow_run_id is not None
    client = MlflowClient(job.tracking.uri)
    parent = client.get_run(run.mlflow_run_id)
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.mlflow_run_id}'")
    trials = [child for child in children if child.info.run_name.startswith("trial-")]
    assert {each.info.status for each in (parent, *children)} == {"FINISHED"}
    assert len(trials) == 9
    point = next(trial for trial in run.findings.trials if trial.assignment == {"anchor_grid": 4, "budgets": [64]})
    child = next(each for each in trials if each.info.run_name.endswith(point.key))
    assert child.data.params == {"anchor_grid": "4", "budgets": "[64]"}
    assert child.data.metrics["score"] == point.metrics["score"]
    assert client.get_metric_history(child.info.run_id, "score")[0].step == 64
    assert "figures" in {file.path for file in client.list_artifacts(run.mlflow_run_id)}
    assert parent.data.metrics["search/trials"] == 9
    volumes = client.get_metric_history(run.mlflow_run_id, "search/hypervolume")
    assert [each.step for each in volumes] == list(range(1, 10))
    assert all(
        after.timestamp >= before.timestamp and after.value >= before.value
        for before, after in itertools.pairwise(volumes)
    )
    assert child.data.tags["parcel.outcome"] == "finished"


def test_a_finished_search_is_only_read_and_missing_mlflow_runs_are_written(
    searched: tuple[TuneJob, SearchRun, str], supernet: Path
) -> None:
    job, run, _ = searched
    assert run.mlflow_run_id is not None
    client = MlflowClient(job.tracking.uri)
    experiment = client.get_run(run.mlflow_run_id).info.experiment_id
    missing = f"trial-splits-{run.findings.trials[-1].key}"
    (existing,) = client.search_runs([experiment], f"attributes.run_name = '{missing}'")
    client.delete_run(existing.info.run_id)
    with pytest.raises(UserError, match=r"has 9 finished trials of this search; add --resume"):
        _run(job)
    again, text = _run(job, resume=True)
    assert again.findings.to_dict() == run.findings.to_dict()
    assert "at the same time" not in text
    (rewritten,) = client.search_runs([experiment], f"attributes.run_name = '{missing}'")
    assert rewritten.info.status == "FINISHED"
    assert rewritten.data.metrics["score"] == run.findings.trials[-1].metrics["score"]
    changed = _split_job(Path(job.storage), supernet, seed=1, algorithm={"type": "random", "trials": 3})
    with pytest.raises(
        UserError, match=r"algorithm.trials: None -> 3; algorithm.type: 'grid' -> 'random'; seed: 0 -> 1"
    ):
        _run(changed, resume=True)


def test_a_search_is_not_resumed_if_its_model_has_changed(tmp_path: Path, supernet: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(supernet, model)
    job = _split_job(tmp_path, model)
    RunFolder(job).claim({reference: each.pin.digest for reference, each in searched_models(job, None).items()})
    (model / "model.safetensors").write_bytes(b"retrained")
    (model / MANIFEST_NAME).unlink()
    write_manifest(model, config={}, git_commit=None, data=None, seed=4)
    with pytest.raises(UserError, match=rf"with another model: the content of {model} has changed"):
        _run(job, resume=True)


def test_an_impossible_search_is_refused_before_the_reference_is_evaluated(
    ray_session: None, tmp_path: Path, supernet: Path
) -> None:
    base = _split_job(tmp_path, supernet).base.model_dump() | {"compute": {"cpus_per_actor": 64}}
    with pytest.raises(
        UserError, match=r"A trial needs 1 process of 64 CPU, but the Ray cluster has only 1 node of 4 CPU"
    ):
        _run(_split_job(tmp_path, supernet, base=base))
    assert not (tmp_path / "predictions").exists()
    with pytest.raises(UserError, match=r"A trial needs 1 process of 64 CPU"):
        tuning_plan(_split_job(tmp_path, supernet, base=base))


def test_the_selected_trial_is_written_as_a_job_file(searched: tuple[TuneJob, SearchRun, str], tmp_path: Path) -> None:
    job, run, _ = searched
    chosen = select(job, run.findings.trials, "max score subject to tokens <= 16", tmp_path / "chosen.yaml").trial
    written = load_job(tmp_path / "chosen.yaml")
    assert isinstance(written, EvaluateJob)
    assert (written.kind, list(written.budgets), written.anchor_grid) == (
        "evaluate",
        chosen.assignment["budgets"],
        chosen.assignment["anchor_grid"],
    )
    assert "max score subject to tokens <= 16" in (tmp_path / "chosen.yaml").read_text()


@pytest.mark.nightly
def test_trained_splits_confirm_the_search(searched: tuple[TuneJob, SearchRun, str], tmp_path: Path) -> None:
    job, run, _ = searched
    train = TINY | {
        "name": "alone",
        "model": {"type": "checkpoint", "reference": "mini_base"},
        "scaling": {"num_workers": 0},
        "tracking": {"uri": None},
    }
    train |= {
        "training": {"steps": 2, "images_per_step": 4},
        "validation": {"samples": 1, "budgets": [16]},
        "report": None,
    }
    # Like every evaluation of a search, that of the confirmation uses the storage of the search.
    elsewhere = tmp_path / "elsewhere"
    confirmed = TuneJob.model_validate(
        job.model_dump()
        | {
            "base": job.base.model_dump() | {"storage": str(elsewhere)},
            "confirm": {"job": train, "budget": 16, "best": 2, "worst": 1},
        }
    )
    result = confirm_splits(confirmed, run, Console(file=io.StringIO()))
    assert run.mlflow_run_id is not None
    client = MlflowClient(job.tracking.uri)
    assert "confirmation.json" in {file.path for file in client.list_artifacts(run.mlflow_run_id)}
    logged = client.get_metric_history(run.mlflow_run_id, "confirmation/trained:16")
    assert {each.step: each.value for each in logged} == {
        each.anchor_grid: each.trained.value for each in result.splits
    }
    assert {each.anchor_grid for each in result.splits} == {0, 2, 4}
    assert [each.is_rule for each in result.splits if each.anchor_grid == 4] == [True]
    assert -1 <= result.correlation <= 1 or result.correlation != result.correlation
    assert (run.folder / "confirmation.png").is_file()
    written = json.loads((run.folder / "confirmation.json").read_text())
    assert written["num_visual_tokens"] == 16
    assert not elsewhere.exists()


def test_a_plan_has_the_trials_and_points_of_a_search(searched: tuple[TuneJob, SearchRun, str], supernet: Path) -> None:
    job = searched[0]
    plan = tuning_plan(job)
    assert (plan.trials, plan.points) == (9, 9)
    assert plan.concurrent == 1
    assert (
        tuning_plan(
            _split_job(Path(job.storage), supernet, base=job.base.model_dump() | {"compute": {"actors": 2}})
        ).concurrent
        == 2
    )
    assert json.dumps(plan.to_dict())
